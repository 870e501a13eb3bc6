//! Guests with disks and networks move, are cut off, and meet hosts that fail.
//!
//! The tiny kernel drives the devices itself (`resources/guest/README.md`, Devices). Its disk is an image that both hosts
//! reach by a path of their own, as with any shared storage; its network is a bridge with a TAP for each host. It sleeps
//! until it is interrupted, and says so if an interrupt does not come.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::UdpSocket;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use umbra_e2e::lan::Lan;
use umbra_e2e::{Console, Guest, Host, Move, PATIENCE, Vm, World, story};

/// A power of two that is a whole number of everything.
const IMAGE_BYTES: u64 = 16 << 20;

/// A disk that proves itself, at this pace.
fn disk_guest(options: &str) -> Guest {
    Guest {
        cpus: 1,
        memory_mib: 64,
        options: format!("work=blkcheck rate=20M wait=irq {options}"),
    }
}

/// An image full of zeros.
fn image(world: &World) -> Result<PathBuf> {
    let path = world.fresh_path("image");
    File::create(&path)?.set_len(IMAGE_BYTES)?;
    Ok(path)
}

fn disk(image: &std::path::Path) -> String {
    format!("id=data,path={}", image.display())
}

/// The newest write that the guest knows to be durable.
fn durable(console: &Console) -> Option<u64> {
    console.lines().iter().rev().find_map(|(_, line)| {
        line.strip_prefix("umbra-guest: disk ")?
            .strip_suffix(" ok")?
            .parse()
            .ok()
    })
}

/// The guest hears from its disk that so many more writes are durable.
fn disk_goes_on(vm: &mut Vm, more: u64) -> Result<u64> {
    vm.console.read();
    let wanted = durable(&vm.console).unwrap_or(0) + more;
    vm.shows(&format!("write {wanted} is durable"), |console| {
        durable(console).filter(|write| *write >= wanted)
    })
}

fn a_line(vm: &mut Vm, part: &str) -> Result<String> {
    vm.shows(part, |console| {
        let mut lines = console.lines().iter();
        lines.find_map(|(_, line)| line.contains(part).then(|| line.clone()))
    })
}

/// What another guest finds on the image: up to which write it is consistent.
fn consistent(host: &Host, image: &std::path::Path) -> Result<u64> {
    let reader = disk_guest("op=verify beat=0 depth=32");
    let disk = format!("{},readonly=on", disk(image));
    let mut vm = host.launch_with(&reader, &["--disk", &disk])?;
    let found = a_line(&mut vm, "disk found ")?;
    ensure!(vm.process.end()? == Some(0), "the reader ends well");
    ensure!(found.contains(" torn=0 "), "{found}");
    let number = found
        .split(' ')
        .find_map(|word| word.strip_prefix("consistent=")?.parse().ok());
    number.with_context(|| format!("a number in: {found}"))
}

#[test]
fn a_disk_agrees_with_its_guest_across_twenty_moves() {
    story(|world| {
        let hosts = [world.host("here")?, world.host("there")?];
        let image = image(world)?;
        let disk = disk(&image);
        let mut vm = hosts[0].launch_with(&disk_guest(""), &["--disk", &disk])?;
        disk_goes_on(&mut vm, 100)?;
        for leg in 1..=20 {
            let (from, to) = (&hosts[(leg + 1) % 2], &hosts[leg % 2]);
            let shadow = to.shadow_with(&[from], &["--disk", &disk])?;
            vm.protect_directly(&shadow)?;
            let how = if leg % 5 == 0 { Move::verified() } else { Move::usual() };
            (vm, _) = vm.migrate_to(shadow, &how.patient())?;
            disk_goes_on(&mut vm, 50)?;
        }
        // More than the disk has blocks: each has been written and read on the way.
        disk_goes_on(&mut vm, IMAGE_BYTES / 4096)?;
        vm.stop()?;
        vm.console.read();
        let (told, found) = (durable(&vm.console).unwrap_or(0), consistent(&hosts[0], &image)?);
        println!("{told} writes told durable, {found} found");
        ensure!(
            found >= told,
            "write {told} was durable, and the image is consistent up to {found}"
        );
        Ok(())
    });
}

#[test]
fn a_guest_restored_from_a_snapshot_under_load_agrees_with_a_disk_copied_at_the_cut() {
    story(|world| {
        let here = world.host("here")?;
        let image = image(world)?;
        let mut vm = here.launch_with(&disk_guest("depth=32"), &["--disk", &disk(&image)])?;
        disk_goes_on(&mut vm, 200)?;
        let folder = world.fresh_path("snapshots");
        std::fs::create_dir(&folder)?;
        let folder = folder.join("a");
        // Requests are under way when the guest is stopped; it stays stopped while the image is copied.
        vm.keep(&folder, &json!({ "pause": true, "verify": "full" }))?;
        let copy = world.fresh_path("copy");
        std::fs::copy(&image, &copy)?;
        vm.process.put("resume", &json!(null))?;
        // What it writes after the cut the restored guest must not see, and would notice.
        disk_goes_on(&mut vm, 2_000)?;
        vm.process.kill()?;
        let mut vm = here.restore(&folder, &["--disk", &disk(&copy)])?;
        disk_goes_on(&mut vm, IMAGE_BYTES / 4096)?;
        vm.stop()
    });
}

#[test]
fn what_a_flush_promised_is_on_the_disk_after_the_vmm_was_killed() {
    story(|world| {
        let here = world.host("here")?;
        let image = image(world)?;
        for round in 1..=3 {
            let guest = disk_guest("op=write rate=0 depth=64");
            let mut vm = here.launch_with(&guest, &["--disk", &disk(&image)])?;
            disk_goes_on(&mut vm, 1_000 * round)?;
            vm.process.kill()?;
            vm.console.read();
            let (told, found) = (durable(&vm.console).unwrap_or(0), consistent(&here, &image)?);
            println!("{told} writes told durable, {found} found");
            ensure!(
                found >= told,
                "write {told} was durable, and the image is consistent up to {found}"
            );
        }
        Ok(())
    });
}

#[test]
fn an_image_that_fails_is_an_error_to_the_guest_and_to_nobody_else() {
    story(|world| {
        let here = world.host("here")?;
        let image = image(world)?;
        let mut vm = here.launch_with(&disk_guest("op=read"), &["--disk", &disk(&image)])?;
        vm.beats_on(500)?;
        // Half of the disk is not there any more.
        File::options().write(true).open(&image)?.set_len(IMAGE_BYTES / 2)?;
        let error = a_line(&mut vm, "disk error op=read status=1 ")?;
        ensure!(error.contains("errors=1"), "{error}");
        vm.beats_on(500)?;
        File::options().write(true).open(&image)?.set_len(IMAGE_BYTES)?;
        vm.beats_on(500)?;
        vm.stop()
    });
}

#[test]
fn a_disk_that_is_read_only_refuses_to_be_written_and_stays_as_it_was() {
    story(|world| {
        let here = world.host("here")?;
        let image = image(world)?;
        let mut vm = here.launch_with(&disk_guest(""), &["--disk", &disk(&image)])?;
        disk_goes_on(&mut vm, 100)?;
        vm.stop()?;
        let before = std::fs::read(&image)?;
        let read_only = format!("{},readonly=on", disk(&image));
        let mut vm = here.launch_with(&disk_guest(""), &["--disk", &read_only])?;
        a_line(&mut vm, "disk is read-only and refuses to be written, status=1")?;
        vm.beats_on(1_000)?;
        vm.stop()?;
        ensure!(std::fs::read(&image)? == before, "the image was written");
        Ok(())
    });
}

#[test]
fn random_numbers_go_on_coming_after_a_move() {
    story(|world| {
        let hosts = [world.host("here")?, world.host("there")?];
        let guest = Guest {
            cpus: 1,
            memory_mib: 64,
            options: "work=rng wait=irq".to_owned(),
        };
        let random = |console: &Console| -> Option<u64> {
            let mut lines = console.lines().iter().rev();
            lines.find_map(|(_, line)| {
                line.strip_prefix("umbra-guest: rng ")?
                    .strip_suffix(" ok")?
                    .parse()
                    .ok()
            })
        };
        let mut vm = hosts[0].launch_with(&guest, &["--rng", "src=/dev/urandom"])?;
        for leg in 1..=4 {
            let (from, to) = (&hosts[(leg + 1) % 2], &hosts[leg % 2]);
            let shadow = to.shadow_for(from)?;
            vm.protect_directly(&shadow)?;
            (vm, _) = vm.migrate_to(shadow, &Move::verified().patient())?;
            let before = random(&vm.console).unwrap_or(0);
            vm.shows("more random numbers", |console| {
                random(console).filter(|bytes| *bytes > before)
            })?;
        }
        vm.stop()
    });
}

const GUEST_ADDRESS: &str = "10.0.0.2";
const ECHO: u16 = 7;
/// Who talks to a guest that moves waits no longer for one answer.
const IMPATIENT: Duration = Duration::from_millis(100);
/// What is not back by then is lost, however busy the machine is.
const LATE: Duration = Duration::from_secs(10);

/// Somebody on the network who numbers datagrams and has them sent back.
struct Talker {
    socket: UdpSocket,
    next: u64,
    back: BTreeSet<u64>,
    lost: u64,
}

impl Talker {
    fn new() -> Result<Self> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        Ok(Self {
            socket,
            next: 0,
            back: BTreeSet::new(),
            lost: 0,
        })
    }

    /// Send one, and wait for it so long.
    fn asks_once(&mut self, patience: Duration) -> Result<bool> {
        self.socket.set_read_timeout(Some(patience))?;
        let number = self.next;
        self.next += 1;
        let payload: Vec<u8> = (number..number + 32).flat_map(u64::to_le_bytes).collect();
        // While the guest is nowhere, nobody answers for its address.
        let _ = self.socket.send_to(&payload, (GUEST_ADDRESS, ECHO));
        let mut buffer = [0; 2048];
        while let Ok(length) = self.socket.recv(&mut buffer) {
            let answer = &buffer[..length];
            let answered = answer.first_chunk().map(|number| u64::from_le_bytes(*number));
            let answered = answered.context("an answer with a number")?;
            let whole: Vec<u8> = (answered..answered + 32).flat_map(u64::to_le_bytes).collect();
            ensure!(answer == whole, "answer {answered} is not what was asked");
            ensure!(self.back.insert(answered), "{answered} was answered twice");
            if answered == number {
                return Ok(true);
            }
        }
        self.lost += 1;
        Ok(false)
    }

    /// The guest is there, and everything that is asked is answered.
    fn is_answered(&mut self, times: usize) -> Result<()> {
        let began = Instant::now();
        while !self.asks_once(IMPATIENT)? {
            ensure!(began.elapsed() < PATIENCE, "nobody at {GUEST_ADDRESS} answers");
        }
        for _ in 0..times {
            ensure!(
                self.asks_once(LATE)?,
                "datagram {} was lost while the guest stayed where it is",
                self.next - 1
            );
        }
        Ok(())
    }
}

/// Between moves nothing is lost. While a move goes on, what is sent in the pause may be, as on any network; but nothing
/// is changed, and nothing is answered twice: that would be two guests, or one that did something again.
#[test]
fn a_guest_is_answered_from_its_old_address_after_each_of_twenty_moves() {
    story(|world| {
        let lan = Lan::new()?;
        let taps = ["tap-a", "tap-b"];
        for tap in taps {
            lan.tap(tap)?;
        }
        let hosts = [world.host("here")?, world.host("there")?];
        let net = taps.map(|tap| format!("id=eth0,tap={tap}"));
        let guest = Guest {
            cpus: 1,
            memory_mib: 64,
            options: format!("work=net wait=irq ip={GUEST_ADDRESS}"),
        };
        let mut vm = hosts[0].launch_with(&guest, &["--net", &net[0]])?;
        let mut talker = Talker::new()?;
        talker.is_answered(100)?;
        let mut lost_in_pauses = 0;
        for leg in 1..=20 {
            let (from, to) = (&hosts[(leg + 1) % 2], &hosts[leg % 2]);
            let shadow = to.shadow_with(&[from], &["--net", &net[leg % 2]])?;
            vm.protect_directly(&shadow)?;
            let over = AtomicBool::new(false);
            let lost = talker.lost;
            // Somebody talks to it all the while.
            let moved = thread::scope(|scope| {
                let talking = scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        talker.asks_once(IMPATIENT)?;
                    }
                    Ok::<(), anyhow::Error>(())
                });
                let moved = vm.migrate_to(shadow, &Move::usual().patient());
                over.store(true, Ordering::Relaxed);
                talking.join().expect("the talker does not panic")?;
                moved
            });
            (vm, _) = moved?;
            lost_in_pauses += talker.lost - lost;
            talker.is_answered(100)?;
        }
        println!("{} datagrams, {lost_in_pauses} lost during 20 moves", talker.next);
        vm.stop()
    });
}
