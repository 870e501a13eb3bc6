//! A Linux boots, works and moves: what a tiny kernel cannot show.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use umbra_e2e::lan::Lan;
use umbra_e2e::linux::{Linux, LinuxGuest};
use umbra_e2e::{Move, PATIENCE, named, story};

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

/// A conversation with a port of the guest over its host's UNIX socket.
fn over_vsock(socket: &Path, port: u16) -> Result<BufReader<UnixStream>> {
    let mut stream = BufReader::new(UnixStream::connect(socket).context("connect to the guest's socket")?);
    stream.get_ref().set_read_timeout(Some(PATIENCE))?;
    writeln!(stream.get_mut(), "CONNECT {port}")?;
    let mut answer = String::new();
    stream.read_line(&mut answer)?;
    ensure!(answer.starts_with("OK "), "the guest's socket answered: {answer}");
    Ok(stream)
}

/// How much memory the guest says it has left to its balloon.
fn in_the_balloon(linux: &Linux) -> Result<u64> {
    let answer = linux.vm.process.ask("GET", "counters", &json!(null))?;
    answer.body["balloon_bytes"].as_u64().context("a balloon")
}

/// Wait until it has left so much; the guest's own ticks are the clock.
fn leaves(linux: &mut Linux, bytes: u64) -> Result<()> {
    for _ in 0..200 {
        linux.says("tick ")?;
        if in_the_balloon(linux)? == bytes {
            return Ok(());
        }
    }
    anyhow::bail!("{} bytes in the balloon, {bytes} asked for", in_the_balloon(linux)?)
}

#[test]
fn a_linux_speaks_over_vsock_and_leaves_memory_to_its_balloon_here_and_where_it_moves() {
    story(|world| {
        let (here, there) = (world.host("here")?, world.host("there")?);
        let sockets = [world.fresh_path("vsock"), world.fresh_path("vsock")];
        let vsocks = sockets
            .each_ref()
            .map(|socket| format!("cid=3,socket={}", socket.display()));
        let devices = vsocks
            .each_ref()
            .map(|vsock| ["--vsock", vsock, "--balloon", "size=0,free_page_reporting=on"]);
        let guest = LinuxGuest::doing("check,vsock");
        let mut linux = here.launch_linux(&guest, &devices[0])?;
        linux.says("vsock: listening")?;
        let mut lines = over_vsock(&sockets[0], 2007)?;
        let mut answer = String::new();
        writeln!(lines.get_mut(), "before")?;
        lines.read_line(&mut answer)?;
        ensure!(answer == "1 before\n", "answered: {answer}");

        linux.vm.process.put("resize", &json!({ "balloon_bytes": 8 << 20 }))?;
        leaves(&mut linux, 8 << 20)?;

        let shadow = there.shadow_with(&[&here], &devices[1])?;
        let (mut linux, _) = linux.moves_to(shadow, &Move::verified())?;
        // The old connection is gone, a new one finds the guest as it was: it counts on.
        answer.clear();
        ensure!(
            matches!(lines.read_line(&mut answer), Ok(0) | Err(_)),
            "an old connection says: {answer}"
        );
        linux.from_now_on();
        linux.says("tick ")?;
        let mut lines = over_vsock(&sockets[1], 2007)?;
        writeln!(lines.get_mut(), "after")?;
        answer.clear();
        lines.read_line(&mut answer)?;
        ensure!(answer == "2 after\n", "answered: {answer}");
        ensure!(in_the_balloon(&linux)? == 8 << 20, "the balloon moved with its guest");
        linux.vm.process.put("resize", &json!({ "balloon_bytes": 0 }))?;
        leaves(&mut linux, 0)?;
        linux.vm.stop()
    });
}
