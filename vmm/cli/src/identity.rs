//! `umbra identity`: the key and certificate that peers know this host by.

use umbra_quic::Identity;

use crate::args::IdentityCommand;
use crate::exit::{Code, Failure};
use crate::say;

/// Make or show an identity.
pub(crate) fn identity(command: &IdentityCommand) -> Result<Code, Failure> {
    match command {
        IdentityCommand::Create(args) => {
            let identity = Identity::generate(&args.name).map_err(Failure::arguments)?;
            identity.save(&args.dir).map_err(Failure::failed)?;
            say::line(identity.fingerprint());
        }
        IdentityCommand::Show(args) => {
            let identity = Identity::load(&args.dir).map_err(Failure::failed)?;
            if args.certificate {
                say::line(identity.certificate_pem().trim_end());
            } else {
                say::line(identity.fingerprint());
            }
        }
    }
    Ok(Code::Success)
}
