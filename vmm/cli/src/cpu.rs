//! `umbra cpu`: what guests may see of a processor, and how two of them differ.

use umbra_machine::Template;
use umbra_machine::cpu::{Difference, Features, Side, compare, features_here};

use crate::args::{CpuCommand, CpuCompareArgs};
use crate::exit::{Code, Failure};
use crate::say;

/// All of this host.
const HOST: &str = "host";

/// Do what is asked.
pub(crate) fn cpu(command: &CpuCommand) -> Result<Code, Failure> {
    match command {
        CpuCommand::Templates => {
            for template in Template::built_in().filter_map(Template::named) {
                say::line(format_args!("{:<11} {}", template.name(), template.description()));
            }
            Ok(Code::Success)
        }
        CpuCommand::Show(args) => {
            let template = Template::find(&args.template)?;
            say::line(format_args!(
                "description = \"a guest with template {} here\"",
                template.name()
            ));
            say::line(features_here(Some(&template))?.to_string().trim_end());
            Ok(Code::Success)
        }
        CpuCommand::Compare(args) => compare_two(args),
    }
}

fn compare_two(args: &CpuCompareArgs) -> Result<Code, Failure> {
    let differences = compare(&features(&args.guest)?, &features(&args.here)?);
    differences.iter().for_each(say::line);
    if differences.is_empty() {
        say::line("no difference");
    }
    Ok(verdict(&differences))
}

fn features(name: &str) -> Result<Features, Failure> {
    if name == HOST {
        return Ok(features_here(None)?);
    }
    Ok(Template::find(name)?.features())
}

/// A guest can run where nothing is missing.
fn verdict(differences: &[Difference]) -> Code {
    if differences.iter().any(|difference| difference.side == Side::Source) {
        Code::Failure
    } else {
        Code::Success
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_second_lacks_is_an_obstacle() {
        let of = |name| features(name).unwrap();
        let up = compare(&of("x86-64-v2"), &of("x86-64-v3"));
        assert!(
            up.iter()
                .any(|difference| difference.feature == "avx2" && difference.side == Side::Here)
        );
        assert_eq!(verdict(&up), Code::Success);
        let down = compare(&of("x86-64-v3"), &of("x86-64-v2"));
        assert!(
            down.iter()
                .any(|difference| difference.to_string() == "avx2: the guest has it, this host does not")
        );
        assert_eq!(verdict(&down), Code::Failure);
    }
}
