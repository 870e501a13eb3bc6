//! Who a node is, and whom it trusts.
//!
//! A node's identity is a key and a certificate that it signed itself. There is no authority above: each side pins the
//! *fingerprint* of the other's certificate, as with ssh host keys, and nothing in the certificate but its key counts.
//! The key file must be readable by its owner alone; a key that others can read is refused, not warned about.

use crate::error::{IdentityError, Unreadable};
use crate::limits::PEM_BYTES;
use core::fmt;
use core::str::FromStr;
use ring::digest;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

const KEY_FILE: &str = "key.pem";
const CERT_FILE: &str = "cert.pem";
const NAME: &str = "1 to 63 letters, digits, `-` or `.`";

/// This node's key and certificate.
pub struct Identity {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    /// Kept as text, because that is how it is saved.
    pem: Pem,
}

struct Pem {
    certificate: String,
    key: String,
}

impl Identity {
    /// A new Ed25519 key and a certificate for it. The name only helps people to tell certificates apart.
    ///
    /// # Errors
    /// The name cannot stand in a certificate.
    pub fn generate(name: &str) -> Result<Self, IdentityError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
        let bad = || IdentityError::Name {
            name: name.chars().take(80).collect(),
            expected: NAME,
        };
        if name.is_empty() || name.len() > 63 || !name.chars().all(plain) {
            return Err(bad());
        }
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).expect("ring makes Ed25519 keys");
        let mut params = rcgen::CertificateParams::new([name.to_owned()]).map_err(|_| bad())?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let certificate = params.self_signed(&key).map_err(|_| bad())?;
        Ok(Self {
            certificate: certificate.der().clone(),
            key: PrivateKeyDer::try_from(key.serialize_der()).expect("rcgen writes PKCS#8"),
            pem: Pem {
                certificate: certificate.pem(),
                key: key.serialize_pem(),
            },
        })
    }

    /// What peers pin.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    /// The certificate as PEM: what is given to peers.
    pub fn certificate_pem(&self) -> &str {
        &self.pem.certificate
    }

    /// Write `key.pem` (mode 0600) and `cert.pem` into `dir`, which is made if it is not there.
    ///
    /// # Errors
    /// There is an identity already, or the files cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), IdentityError> {
        let on = |path: &Path| {
            let path = path.to_owned();
            move |source| IdentityError::File { path, source }
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(on(dir))?;
        let (key, certificate) = (dir.join(KEY_FILE), dir.join(CERT_FILE));
        let created = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&key);
        let mut file = created.map_err(|source| match source.kind() {
            std::io::ErrorKind::AlreadyExists => IdentityError::Exists { path: key.clone() },
            _ => IdentityError::File {
                path: key.clone(),
                source,
            },
        })?;
        file.write_all(self.pem.key.as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(on(&key))?;
        fs::write(&certificate, &self.pem.certificate).map_err(on(&certificate))
    }

    /// Read what [`Identity::save`] wrote.
    ///
    /// # Errors
    /// A file is missing, is not what it should be, the two do not belong together, or others can read the key.
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        let (key_path, certificate_path) = (dir.join(KEY_FILE), dir.join(CERT_FILE));
        let pem = Pem {
            key: read_private(&key_path)?,
            certificate: read_bounded(&certificate_path)?,
        };
        let key = PrivateKeyDer::from_pem_slice(pem.key.as_bytes())
            .map_err(|error| unreadable(&key_path, "a PEM private key", &error))?;
        let certificate = certificate_in(&certificate_path, &pem.certificate)?;
        let signing = rustls::crypto::ring::sign::any_supported_type(&key)
            .map_err(|error| unreadable(&key_path, "an Ed25519 or P-256 private key", &error))?;
        rustls::sign::CertifiedKey::new(vec![certificate.clone()], signing)
            .keys_match()
            .map_err(|error| unreadable(&certificate_path, "the certificate of the key beside it", &error))?;
        Ok(Self { certificate, key, pem })
    }

    pub(crate) fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }
}

/// Never the key.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("fingerprint", &self.fingerprint())
            .finish_non_exhaustive()
    }
}

fn unreadable(path: &Path, expected: &'static str, got: &dyn fmt::Display) -> IdentityError {
    IdentityError::Unreadable {
        path: path.to_owned(),
        expected,
        got: got.to_string(),
    }
}

fn read_private(path: &Path) -> Result<String, IdentityError> {
    let on = |source| IdentityError::File {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(on)?;
    // Of the open file, not of the path: the name may mean another file by now.
    let mode = file.metadata().map_err(on)?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(IdentityError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    read(path, file)
}

fn read_bounded(path: &Path) -> Result<String, IdentityError> {
    read(
        path,
        File::open(path).map_err(|source| IdentityError::File {
            path: path.to_owned(),
            source,
        })?,
    )
}

fn read(path: &Path, file: File) -> Result<String, IdentityError> {
    let mut text = String::new();
    let read = file.take(PEM_BYTES + 1).read_to_string(&mut text);
    read.map_err(|source| IdentityError::File {
        path: path.to_owned(),
        source,
    })?;
    if text.len() as u64 > PEM_BYTES {
        return Err(unreadable(
            path,
            "a PEM file",
            &format_args!("it is longer than {PEM_BYTES} bytes"),
        ));
    }
    Ok(text)
}

fn certificate_in(path: &Path, pem: &str) -> Result<CertificateDer<'static>, IdentityError> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| unreadable(path, "a PEM certificate", &error))
}

/// The SHA-256 of a certificate: 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    pub(crate) fn of(certificate: &CertificateDer<'_>) -> Self {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest::digest(&digest::SHA256, certificate).as_ref());
        Self(bytes)
    }

    /// That of the certificate in this PEM file.
    ///
    /// # Errors
    /// The file cannot be read or holds no certificate.
    pub fn of_file(path: &Path) -> Result<Self, IdentityError> {
        Ok(Self::of(&certificate_in(path, &read_bounded(path)?)?))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

impl FromStr for Fingerprint {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Self, Unreadable> {
        let bad = || Unreadable::new(text, "a fingerprint of 64 hexadecimal digits");
        let digits: Vec<u8> = text
            .chars()
            .map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok()))
            .collect::<Option<_>>()
            .ok_or_else(bad)?;
        if digits.len() != 64 {
            return Err(bad());
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
        Ok(Self(bytes))
    }
}

/// The fingerprints of the peers that are allowed. Nobody else gets further than the handshake.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Peers {
    allowed: BTreeSet<Fingerprint>,
}

impl Peers {
    /// Nobody.
    pub fn none() -> Self {
        Self::default()
    }

    /// Exactly this one.
    pub fn only(peer: Fingerprint) -> Self {
        Self::none().and(peer)
    }

    /// These and one more.
    #[must_use]
    pub fn and(mut self, peer: Fingerprint) -> Self {
        self.allowed.insert(peer);
        self
    }

    /// These and one more, named as an operator names it: a fingerprint, or a certificate file.
    ///
    /// # Errors
    /// It is no fingerprint, and no certificate can be read from a file of that name.
    pub fn and_named(self, text: &str) -> Result<Self, IdentityError> {
        let named = text
            .parse()
            .or_else(|_: Unreadable| Fingerprint::of_file(&PathBuf::from(text)));
        named.map(|peer| self.and(peer))
    }

    /// Whether `peer` is one of them.
    pub fn allows(&self, peer: &Fingerprint) -> bool {
        self.allowed.contains(peer)
    }

    /// Everyone, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Fingerprint> {
        self.allowed.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_loaded_and_the_key_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("new/identity");
        let identity = Identity::generate("host-a.example").unwrap();
        identity.save(&home).unwrap();
        assert_eq!(Identity::load(&home).unwrap().fingerprint(), identity.fingerprint());
        let mode = |file| fs::metadata(home.join(file)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(KEY_FILE), 0o600);
        assert_eq!(
            Fingerprint::of_file(&home.join(CERT_FILE)).unwrap(),
            identity.fingerprint()
        );
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        Identity::generate("a").unwrap().save(dir.path()).unwrap();
        let key = dir.path().join(KEY_FILE);
        for mode in [0o640, 0o604, 0o620, 0o601] {
            fs::set_permissions(&key, fs::Permissions::from_mode(mode)).unwrap();
            let error = Identity::load(dir.path()).unwrap_err().to_string();
            assert!(
                error.contains(&format!(
                    "mode {mode:04o} lets others read the private key; 0600 expected"
                )),
                "{error}"
            );
        }
    }

    #[test]
    fn an_identity_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let first = Identity::generate("a").unwrap();
        first.save(dir.path()).unwrap();
        let error = Identity::generate("b").unwrap().save(dir.path()).unwrap_err();
        assert!(matches!(error, IdentityError::Exists { .. }), "{error}");
        assert_eq!(Identity::load(dir.path()).unwrap().fingerprint(), first.fingerprint());
    }

    #[test]
    fn files_that_are_not_an_identity_are_named_with_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let error = |what: &str| {
            let error = Identity::load(dir.path()).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        };
        error("key.pem: No such file");
        Identity::generate("a").unwrap().save(dir.path()).unwrap();
        fs::write(
            dir.path().join(CERT_FILE),
            Identity::generate("b").unwrap().certificate_pem(),
        )
        .unwrap();
        error("cert.pem: the certificate of the key beside it expected");
        fs::write(dir.path().join(CERT_FILE), "hello").unwrap();
        error("cert.pem: a PEM certificate expected");
        fs::write(dir.path().join(CERT_FILE), "x".repeat(70_000)).unwrap();
        error("cert.pem: a PEM file expected, it is longer than 65536 bytes");
        fs::write(dir.path().join(KEY_FILE), "hello").unwrap();
        fs::write(dir.path().join(CERT_FILE), "hello").unwrap();
        error("key.pem: a PEM private key expected");
    }

    #[test]
    fn a_name_that_cannot_stand_in_a_certificate_is_refused() {
        for name in ["", "two words", "x/y", &"x".repeat(64)] {
            assert!(
                matches!(Identity::generate(name).unwrap_err(), IdentityError::Name { .. }),
                "{name}"
            );
        }
    }

    #[test]
    fn a_fingerprint_is_64_digits_and_nothing_else() {
        let fingerprint = Identity::generate("a").unwrap().fingerprint();
        let text = fingerprint.to_string();
        assert_eq!(text.len(), 64);
        assert_eq!(text.parse(), Ok(fingerprint));
        assert_eq!(text.to_uppercase().parse(), Ok(fingerprint));
        for bad in [
            "",
            "abc",
            &text[1..],
            &format!("{text}0"),
            &text.replace(|c: char| c.is_alphabetic(), "g"),
        ] {
            let error = bad.parse::<Fingerprint>().unwrap_err().to_string();
            assert!(
                error.ends_with("a fingerprint of 64 hexadecimal digits expected"),
                "{error}"
            );
        }
    }

    #[test]
    fn peers_are_named_by_fingerprint_or_file() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b, c) = (
            Identity::generate("a").unwrap(),
            Identity::generate("b").unwrap(),
            Identity::generate("c").unwrap(),
        );
        a.save(dir.path()).unwrap();
        let peers = Peers::none()
            .and_named(dir.path().join(CERT_FILE).to_str().unwrap())
            .and_then(|peers| peers.and_named(&b.fingerprint().to_string()))
            .unwrap();
        assert!(peers.allows(&a.fingerprint()) && peers.allows(&b.fingerprint()) && !peers.allows(&c.fingerprint()));
        assert!(
            Peers::none()
                .and_named("nowhere.pem")
                .unwrap_err()
                .to_string()
                .contains("nowhere.pem")
        );
    }

    #[test]
    fn debug_shows_no_key() {
        let identity = Identity::generate("a").unwrap();
        assert_eq!(
            format!("{identity:?}"),
            format!("Identity {{ fingerprint: {:?}, .. }}", identity.fingerprint())
        );
    }
}
