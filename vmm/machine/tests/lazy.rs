//! A guest whose memory comes after it: with real vCPUs that touch what is not there yet.
#![allow(
    clippy::unwrap_used,
    reason = "a test that panics has failed, which is what it is for"
)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Console, all_pages, image, kernel};
use umbra_core::guest::{Arrivals, Guest, Harvest, PageBytes};
use umbra_machine::{Machine, MachineConfig, Sharing};
use umbra_units::{Bytes, PAGE_SIZE, PageCount, PageId, PageSet, Pfn, SpaceId};

/// Serves what is wanted first, then everything else, as a source does.
fn serve(arrivals: &dyn Arrivals, pages: &[Pfn], bytes: &[u8]) -> usize {
    let page = |pfn: Pfn| -> &PageBytes {
        let at = pages.binary_search(&pfn).unwrap();
        &bytes.as_chunks::<PAGE_SIZE>().0[at]
    };
    let (mut rest, mut wanted) = (pages.iter(), 0);
    while arrivals.left() > PageCount::ZERO {
        let asked = arrivals.wanted(PageCount(4), Duration::from_millis(1));
        wanted += asked.len();
        for id in asked {
            arrivals.arrived(id, page(id.pfn)).unwrap();
        }
        if let Some(next) = rest.next() {
            arrivals.arrived(PageId::ram(*next), page(*next)).unwrap();
        }
    }
    wanted
}

#[test]
fn a_guest_runs_before_its_memory_has_come_and_never_notices() {
    needs_kvm!();
    for sharing in [Sharing::Shared, Sharing::Private] {
        let console = Console::default();
        let cmdline = "cpus=2 work=dirty wss=8M rate=0 simd=on content=mixed";
        let config = MachineConfig::new(kernel(), 2, Bytes::mib(24)).unwrap();
        let config = config.with_cmdline(cmdline).unwrap().with_sharing(sharing);
        let source = Machine::launch(&config, console.sinks()).unwrap();
        source.resume().unwrap();
        console.wait_for("ready");
        console.wait_more(20);
        source.pause().unwrap();

        let there = console.clone();
        let twin = Machine::builder(move || there.sinks())
            .build_machine(&source.describe())
            .unwrap();
        let pages = all_pages(&source.spaces()[0]);
        let bytes = image(&*source);
        // An old copy of everything is there already: nobody may see it.
        for page in &pages {
            twin.apply_page(PageId::ram(*page), &[0xee; PAGE_SIZE]).unwrap();
        }
        let all = PageSet::full(twin.spaces()[0].pages);
        let arrivals = twin
            .await_pages(&Harvest {
                dirty: vec![(SpaceId::RAM, all)],
            })
            .unwrap();
        let server = std::thread::spawn({
            let (arrivals, pages) = (Arc::clone(&arrivals), pages.clone());
            move || serve(&*arrivals, &pages, &bytes)
        });
        // Loading state touches memory too.
        twin.restore(&source.save().unwrap()).unwrap();
        twin.resume().unwrap();
        console.wait_more(50);
        let wanted = server.join().unwrap();
        println!(
            "{sharing:?}: {wanted} of {} pages were wanted before they came",
            pages.len()
        );
        assert_ne!(wanted, 0);
        console.wait_more(50);
        assert_eq!(twin.exit_reason(), None, "{}", console.text());
        assert!(!console.text().contains("CORRUPT"), "{}", console.text());
        // And it moves on as any other.
        twin.pause().unwrap();
        let next = common::move_to_twin(&*twin, &console);
        next.resume().unwrap();
        console.wait_more(20);
        assert!(!console.text().contains("CORRUPT"), "{}", console.text());
    }
}
