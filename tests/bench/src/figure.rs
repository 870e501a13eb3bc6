//! A figure: what was measured, how often, and whether it is what was promised.

use serde_json::json;

/// What a figure should be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Aim {
    /// This or less.
    AtMost(f64),
    /// This or more.
    AtLeast(f64),
    /// Nobody promised anything.
    None,
}

/// One line of the result.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Figure {
    pub(crate) name: &'static str,
    unit: &'static str,
    aim: Aim,
    samples: Vec<f64>,
}

impl Figure {
    /// A figure of at least one sample.
    pub(crate) fn new(name: &'static str, unit: &'static str, aim: Aim, mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        Self {
            name,
            unit,
            aim,
            samples,
        }
    }

    /// The middle sample.
    pub(crate) fn median(&self) -> f64 {
        let middle = self.samples.len() / 2;
        match self.samples.len() {
            0 => f64::NAN,
            odd if odd % 2 == 1 => self.samples[middle],
            _ => f64::midpoint(self.samples[middle - 1], self.samples[middle]),
        }
    }

    /// The smallest sample that 99 of 100 are not above; with fewer than a hundred, the largest.
    pub(crate) fn p99(&self) -> f64 {
        let at = (self.samples.len() * 99).div_ceil(100);
        self.samples.get(at.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    }

    /// `{"name","unit","median","p99","n","aim","met"}`
    pub(crate) fn line(&self) -> String {
        let (aim, met) = match self.aim {
            Aim::AtMost(most) => (json!(rounded(most)), json!(self.median() <= most)),
            Aim::AtLeast(least) => (json!(rounded(least)), json!(self.median() >= least)),
            Aim::None => (json!(null), json!(null)),
        };
        json!({
            "name": self.name, "unit": self.unit, "median": rounded(self.median()), "p99": rounded(self.p99()),
            "n": self.samples.len(), "aim": aim, "met": met,
        })
        .to_string()
    }
}

/// Three digits behind the point are more than any of these figures knows.
fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(samples: &[f64]) -> Figure {
        Figure::new("x", "ms", Aim::AtMost(3.0), samples.to_vec())
    }

    #[test]
    fn the_median_is_the_middle_and_the_99th_percentile_near_the_top() {
        assert_eq!(figure(&[3.0, 1.0, 2.0]).median().to_bits(), 2f64.to_bits());
        assert_eq!(figure(&[4.0, 1.0, 2.0, 3.0]).median().to_bits(), 2.5f64.to_bits());
        let many: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(figure(&many).p99().to_bits(), 198f64.to_bits());
        assert_eq!(figure(&many[..20]).p99().to_bits(), 20f64.to_bits());
    }

    #[test]
    fn a_line_has_the_names_that_others_read() {
        let line = figure(&[1.0, 2.0, 9.0]).line();
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            value,
            json!({"name":"x","unit":"ms","median":2.0,"p99":9.0,"n":3,"aim":3.0,"met":true})
        );
    }
}
