//! A Linux boots, works and moves: what a tiny kernel cannot show.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use umbra_e2e::lan::Lan;
use umbra_e2e::linux::LinuxGuest;
use umbra_e2e::{Move, named, story};

/// One client of the service that answers each line `LINE` by `N LINE`, where N counts them.
struct Client {
    stream: BufReader<TcpStream>,
    asked: u64,
}

impl Client {
    fn new(lan: &Lan) -> Result<Self> {
        Ok(Self {
            stream: BufReader::new(lan.connect("10.0.0.2:2007")?),
            asked: 0,
        })
    }

    /// Every answer is there, once and in order.
    fn asks(&mut self, times: u64) -> Result<()> {
        for _ in 0..times {
            self.asked += 1;
            let asked = self.asked;
            writeln!(self.stream.get_mut(), "question {asked}").context("ask over TCP")?;
            let mut answer = String::new();
            self.stream.read_line(&mut answer).context("an answer over TCP")?;
            ensure!(
                answer.trim_end() == format!("{asked} question {asked}"),
                "answered: {answer}"
            );
        }
        Ok(())
    }
}

#[test]
fn a_linux_checks_itself_pings_serves_tcp_and_keeps_its_filesystem_across_twenty_moves() {
    story(|world| {
        let lan = Lan::new()?;
        let hosts = [world.host("here")?, world.host("there")?];
        for tap in ["tap0", "tap1"] {
            lan.tap(tap)?;
        }
        let image = world.fresh_path("disk.img");
        std::fs::File::create(&image)?.set_len(32 << 20)?;
        let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image).output();
        let made = made.context("run `mkfs.ext4`, of Debian's e2fsprogs")?;
        ensure!(
            made.status.success(),
            "mkfs.ext4: {}",
            String::from_utf8_lossy(&made.stderr)
        );

        let disk = format!("id=data,path={}", image.display());
        let devices = |host: usize| {
            let net = format!("id=eth0,tap=tap{host}");
            ["--disk".to_owned(), disk.clone(), "--net".to_owned(), net]
        };
        let guest = LinuxGuest::doing("check,net,disk,run")
            .with_tools()
            .with("umbra.ip=10.0.0.2/24 umbra.disk=ext4 umbra.run=\"ping 10.0.0.1\"")
            .with_cpus(2);
        let mut linux = hosts[0].launch_linux(&guest, &devices(0).each_ref().map(String::as_str))?;
        linux.says("umbra-linux: ready")?;
        linux.says("disk 8 ok")?;
        let mut client = Client::new(&lan)?;
        client.asks(5)?;
        let mut pauses = Vec::new();
        for leg in 1..=20 {
            let (from, to) = (&hosts[(leg + 1) % 2], &hosts[leg % 2]);
            let more = devices(leg % 2);
            let shadow = to.shadow_with(&[from], &more.each_ref().map(String::as_str))?;
            let how = if leg % 5 == 0 { Move::verified() } else { Move::usual() };
            let (there, report) = linux.moves_to(shadow, &how)?;
            linux = there;
            pauses.push(report.pause());
            client.asks(3)?;
            linux.from_now_on();
            for sign_of_life in ["tick ", " ok", "bytes from 10.0.0.1"] {
                linux.says(sign_of_life)?;
            }
        }
        pauses.sort();
        println!(
            "pauses of 20 moves of a Linux: least {:?}, middle {:?}, most {:?}",
            pauses[0], pauses[10], pauses[19]
        );
        ensure!(linux.said("ended with") == 0, "a job has ended");
        linux.vm.stop()
    });
}

#[test]
fn all_eight_vcpus_of_a_linux_are_there_after_a_move() {
    story(|world| {
        let (here, there) = (world.host("here")?, world.host("there")?);
        let mut linux = here.launch_linux(&LinuxGuest::doing("check").with_cpus(8), &[])?;
        linux.says("check: cpus=8")?;
        linux.says("tick ")?;
        let (mut linux, _) = linux.moves_to(there.shadow_for(&here)?, &Move::verified())?;
        linux.from_now_on();
        for _ in 0..3 {
            // A tick names how many workers, each pinned to its processor, made a step since the one before.
            linux.says("cpus=8 steps=")?;
        }
        linux.vm.stop()
    });
}

#[test]
fn a_linux_boots_again_when_it_is_reset_and_powers_off_when_its_button_is_pressed() {
    story(|world| {
        let mut linux = world.host("here")?.launch_linux(&LinuxGuest::doing("check"), &[])?;
        linux.says("umbra-linux: ready")?;
        linux.says("tick ")?;
        linux.vm.process.put("reboot", &json!(null))?;
        linux.vm.process.until("the guest boots again", named("rebooted"))?;
        linux.from_now_on();
        linux.says("umbra-linux: init")?;
        linux.says("tick ")?;
        linux.vm.process.put("power-button", &json!(null))?;
        linux.says("umbra-linux: end: power button")?;
        linux.says("umbra-linux: power off")?;
        ensure!(
            linux.vm.process.end()? == Some(0),
            "a guest that powers off ends its process well"
        );
        Ok(())
    });
}

#[test]
fn a_bzimage_boots_too_and_a_linux_restarts_itself() {
    story(|world| {
        let here = world.host("here")?;
        let guest = LinuxGuest::doing("verify").from_bzimage().with("umbra.end=reboot");
        // Its one job ends at once, for it has no disk; then it restarts, which ends a process that is not to reboot.
        let mut linux = here.launch_linux(&guest, &["--no-reboot"])?;
        linux.says("umbra-linux: init")?;
        linux.says("umbra-linux: reboot")?;
        ensure!(
            linux.vm.process.end()? == Some(0),
            "a reset that is not followed ends well"
        );
        Ok(())
    });
}
