//! Guests with disks move, are cut off, and meet hosts that fail.
//!
//! The tiny kernel drives the devices itself (`resources/guest/README.md`, Devices). Its disk is an image that both hosts
//! reach by a path of their own, as with any shared storage. It sleeps until it is interrupted, and says so if an interrupt
//! does not come.

use std::fs::File;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use umbra_e2e::{Console, Guest, Host, Move, Vm, World, story};

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
