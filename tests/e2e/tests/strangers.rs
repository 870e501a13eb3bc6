//! Whoever is not who they should be, or does not say what they should, is refused in a clear line, and the process that
//! refused them goes on as if nothing had been.

use std::io::Write;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use quinn::crypto::rustls::QuicClientConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use serde_json::json;
use umbra_core::guest::{Space, StateRecord};
use umbra_core::wire::{Hello, Message};
use umbra_e2e::{Guest, Host, Move, Shadow, Weather, api, named, phase, story};
use umbra_paths::Class;
use umbra_quic::{ConnectConfig, Identity, LinkHandle, PathSpec, Peers, Tuning};
use umbra_units::{GuestId, PageCount, Rng, SessionId, Term};

/// After all that, the shadow does for an honest source what it is there for.
fn still_serves(here: &Host, shadow: Shadow) -> Result<()> {
    ensure!(shadow.is_silent(), "a stranger's guest ran");
    let mut vm = here.launch(&Guest::idle())?;
    vm.beats_on(10)?;
    vm.protect_directly(&shadow)?;
    let (vm, _) = vm.migrate_to(shadow, &Move::verified().patient())?;
    vm.stop()
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn address(shadow: &Shadow) -> Result<SocketAddr> {
    Ok(shadow.listen[0].trim_start_matches("quic:").parse()?)
}

/// The transport's own way to a shadow, as this host.
fn config(host: &Host, shadow: &Shadow) -> Result<ConnectConfig> {
    let identity = Arc::new(Identity::load(host.identity())?);
    let peers = Peers::only(shadow.fingerprint().parse()?);
    Ok(ConnectConfig::new(
        vec![PathSpec::to(address(shadow)?)],
        identity,
        peers,
    ))
}

#[test]
fn a_shadow_with_another_certificate_than_the_pinned_one_gets_no_page() {
    story(|world| {
        let (here, there, elsewhere) = (world.host("here")?, world.host("there")?, world.host("elsewhere")?);
        let mut vm = here.launch(&Guest::idle())?;
        let shadow = there.shadow_for(&here)?;
        let wrong = json!({ "to": shadow.listen, "peers": [elsewhere.fingerprint()] });
        let refused = vm.process.refuses("protect", &wrong)?;
        println!("{refused}");
        ensure!(
            refused.contains(there.fingerprint()),
            "names the certificate it met: {refused}"
        );
        ensure!(vm.process.status()?["role"] == "running", "nobody shadows it");
        vm.beats_on(100)?;
        drop(vm);
        still_serves(&here, shadow)
    });
}

#[test]
fn a_source_that_is_not_on_the_list_is_turned_away() {
    story(|world| {
        let (here, there, elsewhere) = (world.host("here")?, world.host("there")?, world.host("elsewhere")?);
        let shadow = there.shadow_for(&here)?;
        let mut vm = elsewhere.launch(&Guest::idle())?;
        let refused = vm.process.refuses(
            "protect",
            &json!({ "to": shadow.listen, "peers": [shadow.fingerprint()] }),
        )?;
        println!("{refused}");
        ensure!(
            refused.contains("refuse") || refused.contains("not allowed"),
            "says that it was refused: {refused}"
        );
        vm.beats_on(100)?;
        drop(vm);
        let log = shadow.process.log();
        ensure!(
            log.contains("turned away") && log.contains(elsewhere.fingerprint()),
            "says whom: {log}"
        );
        still_serves(&here, shadow)
    });
}

#[test]
fn a_source_of_another_version_is_told_what_each_side_speaks() {
    story(|world| {
        let (here, there) = (world.host("here")?, world.host("there")?);
        let shadow = there.shadow_for(&here)?;
        let mut config = config(&here, &shadow)?;
        config.tuning = Tuning {
            versions: vec![77, 78],
            ..Tuning::default()
        };
        let refused = runtime()?
            .block_on(umbra_quic::connect(config))
            .err()
            .context("refused")?
            .to_string();
        println!("{refused}");
        ensure!(
            refused.contains("77") && refused.contains('1'),
            "names the versions: {refused}"
        );
        still_serves(&here, shadow)
    });
}

fn hello() -> Hello {
    Hello {
        versions: vec![1],
        guest: GuestId([7; 16]),
        session: SessionId([8; 16]),
        term: Term(1),
        description: StateRecord {
            kind: "machine".to_owned(),
            version: 1,
            bytes: vec![],
        },
        spaces: vec![Space::ram(PageCount(1024))],
    }
}

/// What is wrong with it, the messages, and the blocks.
type Nonsense = (&'static str, Vec<Vec<u8>>, Vec<Vec<u8>>);

/// Say these words on a link that was properly joined; what the shadow says to that, and why it closed.
async fn says(link: LinkHandle, words: &[Vec<u8>], blocks: &[Vec<u8>]) -> Result<String> {
    let (sender, mut receiver) = link.split();
    for word in words {
        sender.send_message(word.clone()).await?;
    }
    for block in blocks {
        sender.send_block(Class::Bulk, block.clone()).await?;
    }
    while let Some(event) = receiver.recv().await {
        if let umbra_quic::Event::Ended(why) = event {
            return Ok(why.to_string());
        }
    }
    Ok("no word".to_owned())
}

#[test]
fn a_friend_who_talks_nonsense_is_sent_away_and_told_why() {
    story(|world| {
        let (here, there) = (world.host("here")?, world.host("there")?);
        let mut shadow = there.shadow_for(&here)?;
        let runtime = runtime()?;
        let huge = vec![Space::ram(PageCount(1 << 40))];
        let truncated = Message::Hello(hello()).encode();
        let nonsense: [Nonsense; 7] = [
            ("no message", vec![vec![0xff; 900]], vec![]),
            ("an empty message", vec![vec![]], vec![]),
            ("half a hello", vec![truncated[..truncated.len() / 2].to_vec()], vec![]),
            (
                "a version nobody speaks",
                vec![
                    Message::Hello(Hello {
                        versions: vec![77],
                        ..hello()
                    })
                    .encode(),
                ],
                vec![],
            ),
            (
                "more memory than there is",
                vec![
                    Message::Hello(Hello {
                        spaces: huge,
                        ..hello()
                    })
                    .encode(),
                ],
                vec![],
            ),
            ("no machine", vec![Message::Hello(hello()).encode()], vec![]),
            ("pages before a guest", vec![], vec![vec![0xa5; 70_000]]),
        ];
        for (what, words, blocks) in nonsense {
            let why = runtime.block_on(async {
                let link = umbra_quic::connect(config(&here, &shadow)?).await?;
                tokio::time::timeout(umbra_e2e::PATIENCE, says(link, &words, &blocks)).await?
            });
            let why = why.with_context(|| what.to_owned())?;
            println!("{what}: {why}");
            ensure!(!why.is_empty() && why.lines().count() == 1, "{what}: {why}");
            shadow.process.until(what, phase("abandoned"))?;
            ensure!(shadow.process.is_alive(), "{what}");
            let told = shadow.process.status()?["last_error"].clone();
            ensure!(
                told.is_string(),
                "{what}: the shadow's operator is not told why: {told}"
            );
        }
        still_serves(&here, shadow)
    });
}

/// Takes any certificate: the client that must be refused is us.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// QUIC as this host, and from there on whatever one likes.
async fn quic(host: &Host, shadow: &Shadow) -> Result<(quinn::Endpoint, quinn::Connection)> {
    let certificate = CertificateDer::from_pem_file(host.identity().join("cert.pem"))?;
    let key = PrivateKeyDer::from_pem_file(host.identity().join("key.pem"))?;
    let mut crypto = rustls::ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_client_auth_cert(vec![certificate], key)?;
    crypto.alpn_protocols = vec![b"umbra".to_vec()];
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(crypto)?));
    let endpoint = quinn::Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    let connection = endpoint.connect_with(config, address(shadow)?, "umbra")?.await?;
    Ok((endpoint, connection))
}

#[test]
fn noise_and_torn_streams_on_the_listening_port_disturb_no_session() {
    story(|world| {
        let (here, there) = (world.host("here")?, world.host("there")?);
        let mut vm = here.launch(&Guest::dirty("4M", "mixed"))?;
        let shadow = there.shadow_for(&here)?;
        let roads = world.roads(&shadow, &[Weather::clear(); 2])?;
        vm.protect(&shadow, &roads)?;
        vm.is_following()?;

        // Datagrams of noise, at the shadow and at the source's relay; some begin as QUIC's first packets do.
        let noise = UdpSocket::bind("127.0.0.1:0")?;
        let mut rng = Rng::new(7);
        let road: SocketAddr = roads.to()[0].trim_start_matches("quic:").parse()?;
        for round in 0..400 {
            let mut bytes = vec![0; usize::try_from(rng.below(1_400))?];
            rng.fill(&mut bytes);
            if round % 2 == 0 && bytes.len() > 8 {
                bytes[..6].copy_from_slice(&[0xc3, 0, 0, 0, 1, 8]);
            }
            noise.send_to(&bytes, address(&shadow)?)?;
            noise.send_to(&bytes, road)?;
        }
        runtime()?.block_on(async {
            // A join that is noise, one that ends early, one that never ends, and noise instead of one.
            for bytes in [&b"nonsense"[..], b"umbra/jn", &[0xff; 4_000]] {
                let (_endpoint, connection) = quic(&here, &shadow).await?;
                let (mut send, _recv) = connection.open_bi().await?;
                let _ = send.write_all(bytes).await;
                let _ = send.finish();
                let why = tokio::time::timeout(umbra_e2e::PATIENCE, connection.closed()).await?;
                println!("{} bytes of nonsense: {why}", bytes.len());
            }
            let (_endpoint, silent) = quic(&here, &shadow).await?;
            let why = tokio::time::timeout(umbra_e2e::PATIENCE, silent.closed()).await?;
            println!("not a word: {why}");
            anyhow::Ok(())
        })?;
        vm.beats_on(200)?;
        ensure!(vm.process.told(named("unprotected")).is_none(), "the session suffered");
        let (mut vm, report) = vm.migrate_to(shadow, &Move::verified().patient())?;
        ensure!(report.audited(), "{report:?}");
        vm.checks_on(10_000)?;
        vm.stop()
    });
}

#[test]
fn requests_that_make_no_sense_are_answered_in_one_line_and_the_guest_runs_on() {
    story(|world| {
        let mut vm = world.host("here")?.launch(&Guest::idle())?;
        vm.beats_on(10)?;
        let nobody = "00".repeat(32);
        let too_many = vec!["quic:127.0.0.1:9"; 1_000];
        for (method, path, body, status, word) in [
            ("GET", "nothing", json!(null), 404, "nothing"),
            ("GET", "pause", json!(null), 405, "PUT"),
            ("PUT", "status", json!(null), 405, "GET"),
            ("PUT", "protect", json!({}), 400, "missing field"),
            ("PUT", "protect", json!([1, 2]), 400, "request body"),
            (
                "PUT",
                "protect",
                json!({ "to": ["tcp:1.2.3.4:5"], "peers": [nobody] }),
                400,
                "to:",
            ),
            (
                "PUT",
                "protect",
                json!({ "to": ["quic:127.0.0.1:9"], "peers": ["ab"] }),
                400,
                "peers:",
            ),
            (
                "PUT",
                "protect",
                json!({ "to": [], "peers": [nobody] }),
                400,
                "to: expected 1 to",
            ),
            (
                "PUT",
                "protect",
                json!({ "to": too_many, "peers": [nobody] }),
                400,
                "to: expected 1 to",
            ),
            (
                "PUT",
                "migrate",
                json!({ "downtime": 1 }),
                400,
                "unknown field `downtime`",
            ),
            ("PUT", "migrate", json!({ "timeout_ms": -1 }), 400, "timeout_ms"),
            ("PUT", "migrate", json!({ "verify": "some" }), 400, "`digest` or `full`"),
            ("PUT", "migrate", json!({ "verify": "x".repeat(100_000) }), 413, "65536"),
            ("PUT", "unprotect", json!(null), 409, "nobody shadows"),
            (
                "PUT",
                "resume",
                json!({ "peer_is_dead": true }),
                409,
                "nothing was handed over",
            ),
        ] {
            let answer = vm.process.ask(method, path, &body)?;
            let error = answer.error();
            ensure!(
                answer.status == status,
                "{method} {path}: {status} expected, got {answer:?}"
            );
            ensure!(
                error.contains(word) && error.lines().count() == 1,
                "{method} {path}: {word:?} expected: {error}"
            );
        }
        for garbage in [
            &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"[..],
            b"GET\r\n\r\n",
            &[0xff; 100_000],
        ] {
            let mut stream = UnixStream::connect(vm.process.socket())?;
            // The process may close before it has read everything.
            let _ = stream.write_all(garbage);
        }
        let torn = b"PUT /api/v1/migrate HTTP/1.1\r\nHost: umbra\r\nContent-Length: 50\r\n\r\n{\"verify\":";
        UnixStream::connect(vm.process.socket())?.write_all(torn)?;
        ensure!(api::ask(vm.process.socket(), "GET", "ping", "")?.is_ok(), "it answers");
        vm.beats_on(100)?;
        vm.stop()
    });
}
