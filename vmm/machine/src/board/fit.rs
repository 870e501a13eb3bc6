//! Which virtio devices a machine has, and what of this host is behind each.
//!
//! A machine that is launched has what its configuration says. A twin has what its guest's description says, and the
//! configuration given to its builder only says where on this host each device finds its other half; a device without one
//! is refused by name, with what to say about it.

use std::sync::Arc;
use std::time::Duration;

use umbra_devices::virtio::limiter::{Limits, Rate};
use umbra_devices::virtio::{balloon, block, console, net, rng, vsock};
use umbra_units::PageCount;

use super::spec::Spec;
use crate::backend::disk::{self, FileDisk};
use crate::backend::entropy::HostEntropy;
use crate::backend::image::Image;
use crate::backend::streams::UnixStreams;
use crate::backend::tap::{HostTap, TapSource};
use crate::config::devices::{Devices, DiskConfig, Mac, NetConfig, RateLimit, RngConfig, VsockConfig};
use crate::error::Error;
use crate::memory::Memory;
use crate::output::Output;

/// One device, whole.
pub(crate) struct Fit {
    pub(crate) spec: Spec,
    pub(crate) backend: Backend,
}

/// What is behind a device.
pub(crate) enum Backend {
    Rng(rng::Wiring),
    Disk {
        image: Arc<Image>,
        disk: Arc<FileDisk>,
        wiring: block::Wiring,
    },
    Net {
        tap: Arc<HostTap>,
        wiring: net::Wiring,
    },
    Vsock {
        streams: Arc<UnixStreams>,
        wiring: vsock::Wiring,
    },
    Balloon(balloon::Wiring),
    Console(console::Wiring),
}

/// What an operator says a machine's devices are.
pub(crate) fn launched(devices: &Devices, memory: &Arc<Memory>, console: &Arc<Output>) -> Result<Vec<Fit>, Error> {
    let mut fits = Vec::new();
    for config in &devices.disk {
        let id = config.id.clone().expect("Devices::complete gives every disk an id");
        let readonly = config.readonly.unwrap_or(false);
        let image = Arc::new(Image::open(&format!("disk/{id}"), config, readonly)?);
        let geometry = disk::geometry(&image);
        fits.push(disk_fit(Spec::Disk { id, geometry }, config, image, memory)?);
    }
    for config in &devices.net {
        let id = config
            .id
            .clone()
            .expect("Devices::complete gives every interface an id");
        let mac = config.mac().bytes();
        fits.push(net_fit(
            Spec::Net {
                id,
                mac,
                mtu: config.mtu,
            },
            config,
        )?);
    }
    if let Some(config) = &devices.vsock {
        fits.push(vsock_fit(config)?);
    }
    if let Some(config) = &devices.balloon {
        let pages = PageCount::holding(config.size);
        let spec = Spec::Balloon {
            target: u32::try_from(pages.0)
                .ok()
                .filter(|_| pages <= memory.space().present_pages())
                .ok_or_else(|| Error::Config {
                    field: "balloon",
                    expected: "size: expected at most the guest's memory".to_owned(),
                })?,
            deflate_on_oom: config.deflate_on_oom,
            reporting: config.free_page_reporting,
        };
        fits.push(balloon_fit(spec, memory));
    }
    if devices.console.is_some() {
        fits.push(console_fit(console));
    }
    if let Some(config) = &devices.rng {
        fits.push(rng_fit(config)?);
    }
    Ok(fits)
}

/// What a guest's description says, found on this host.
pub(crate) fn described(
    specs: &[Spec],
    devices: &Devices,
    memory: &Arc<Memory>,
    console: &Arc<Output>,
) -> Result<Vec<Fit>, Error> {
    nothing_is_left_over(specs, devices)?;
    let fit = |spec: &Spec| match spec {
        Spec::Rng => rng_fit(&devices.rng.clone().unwrap_or_default()),
        Spec::Disk { id, geometry } => {
            let kind = spec.kind();
            let config = devices.disk.iter().find(|disk| disk.id.as_ref() == Some(id));
            let config = config.ok_or_else(|| nowhere(&kind, &format!("--disk id={id},path=PATH")))?;
            agrees(&kind, "readonly", config.readonly, geometry.read_only)?;
            let image = Arc::new(Image::open(&kind, config, geometry.read_only)?);
            same_disk(&kind, geometry, &image)?;
            disk_fit(spec.clone(), config, image, memory)
        }
        Spec::Net { id, mac, mtu } => {
            let kind = spec.kind();
            let config = devices.net.iter().find(|net| net.id.as_ref() == Some(id));
            let config = config.ok_or_else(|| nowhere(&kind, &format!("--net id={id},tap=NAME")))?;
            agrees(&kind, "mac", config.mac.map(Mac::bytes), *mac)?;
            agrees(&kind, "mtu", config.mtu.map(Some), *mtu)?;
            net_fit(spec.clone(), config)
        }
        Spec::Vsock => {
            let config = devices.vsock.as_ref();
            vsock_fit(config.ok_or_else(|| nowhere("vsock/0", "--vsock cid=N,socket=PATH"))?)
        }
        Spec::Balloon { .. } => Ok(balloon_fit(spec.clone(), memory)),
        Spec::Console => Ok(console_fit(console)),
    };
    specs.iter().map(fit).collect()
}

/// A device that an operator prepared for and that the guest does not have is a mistake of one of the two.
fn nothing_is_left_over(specs: &[Spec], devices: &Devices) -> Result<(), Error> {
    let kinds: Vec<String> = specs.iter().map(Spec::kind).collect();
    let disks = devices.disk.iter().filter_map(|disk| disk.id.as_ref());
    let nets = devices.net.iter().filter_map(|net| net.id.as_ref());
    let vsock = devices.vsock.iter().map(|_| "vsock/0".to_owned());
    let mut given = disks
        .map(|id| format!("disk/{id}"))
        .chain(nets.map(|id| format!("net/{id}")))
        .chain(vsock);
    match given.find(|kind| !kinds.contains(kind)) {
        None => Ok(()),
        Some(kind) => Err(Error::Incompatible(format!(
            "{kind}: given here, but the guest has no such device"
        ))),
    }
}

fn rng_fit(config: &RngConfig) -> Result<Fit, Error> {
    let entropy = Arc::new(HostEntropy::open(config)?);
    Ok(Fit {
        spec: Spec::Rng,
        backend: Backend::Rng(rng::Wiring { index: 0, entropy }),
    })
}

fn disk_fit(spec: Spec, config: &DiskConfig, image: Arc<Image>, memory: &Arc<Memory>) -> Result<Fit, Error> {
    let Spec::Disk { id, geometry } = &spec else {
        unreachable!("called with a disk's spec")
    };
    let kind = spec.kind();
    let disk = Arc::new(FileDisk::new(&kind, image.clone(), memory)?);
    let wiring = block::Wiring {
        id: id.to_string(),
        serial: id.to_string(),
        geometry: *geometry,
        queues: 1,
        limits: limits(&kind, config.rate_limit)?,
        disk: disk.clone(),
    };
    Ok(Fit {
        spec,
        backend: Backend::Disk { image, disk, wiring },
    })
}

fn net_fit(spec: Spec, config: &NetConfig) -> Result<Fit, Error> {
    let Spec::Net { id, mac, mtu } = &spec else {
        unreachable!("called with an interface's spec")
    };
    let source = match (&config.tap, config.fd) {
        (Some(name), _) => TapSource::Named(name.clone()),
        (None, Some(fd)) => TapSource::Inherited(fd),
        (None, None) => unreachable!("Devices::complete refuses an interface without either"),
    };
    let tap = Arc::new(HostTap::open(&source, *mtu)?);
    tracing::info!(net = %id, tap = tap.name(), created = tap.created(), "interface");
    let limits = limits(&spec.kind(), config.rate_limit)?;
    let wiring = net::Wiring {
        id: id.to_string(),
        mac: *mac,
        mtu: *mtu,
        offload: true,
        guest_announce: true,
        receive_limits: limits,
        send_limits: limits,
        tap: tap.clone(),
    };
    Ok(Fit {
        spec,
        backend: Backend::Net { tap, wiring },
    })
}

fn vsock_fit(config: &VsockConfig) -> Result<Fit, Error> {
    let streams = Arc::new(UnixStreams::listen(&config.socket)?);
    let wiring = vsock::Wiring {
        cid: config.cid.into(),
        streams: streams.clone(),
    };
    Ok(Fit {
        spec: Spec::Vsock,
        backend: Backend::Vsock { streams, wiring },
    })
}

fn balloon_fit(spec: Spec, memory: &Arc<Memory>) -> Fit {
    let Spec::Balloon {
        target,
        deflate_on_oom,
        reporting,
    } = spec
    else {
        unreachable!("called with a balloon's spec")
    };
    let most = u32::try_from(memory.space().present_pages().0).unwrap_or(u32::MAX);
    let wiring = balloon::Wiring {
        target: target.min(most),
        most,
        deflate_on_oom,
        reporting,
        advice: memory.clone(),
    };
    Fit {
        spec,
        backend: Backend::Balloon(wiring),
    }
}

fn console_fit(console: &Arc<Output>) -> Fit {
    let wiring = console::Wiring {
        index: 0,
        out: console.clone(),
    };
    Fit {
        spec: Spec::Console,
        backend: Backend::Console(wiring),
    }
}

/// The same disk on another host is of the same size, and its blocks are not larger.
fn same_disk(kind: &str, theirs: &block::Geometry, image: &Image) -> Result<(), Error> {
    let refuse = |why: String| {
        Err(Error::File {
            path: image.path().to_owned(),
            why,
        })
    };
    let ours = disk::geometry(image);
    if ours.sectors != theirs.sectors {
        return refuse(format!(
            "cannot be {kind}: it has {} sectors, the guest's disk has {}",
            ours.sectors, theirs.sectors
        ));
    }
    if ours.block > theirs.block {
        return refuse(format!(
            "cannot be {kind}: direct=on needs blocks of {} bytes here, the guest's disk has {}",
            ours.block, theirs.block
        ));
    }
    Ok(())
}

fn limits(kind: &str, config: Option<RateLimit>) -> Result<Limits, Error> {
    let Some(config) = config else {
        return Ok(Limits::default());
    };
    let rate = |size: u64, refill_ms: u64, burst: u64| {
        let rate = (size > 0).then(|| Rate::new(size, Duration::from_millis(refill_ms), burst));
        rate.transpose()
            .map_err(|error| Error::Incompatible(format!("{kind}: rate limit: {error}")))
    };
    Ok(Limits {
        bandwidth: rate(config.bw_size, config.bw_refill_time, config.bw_one_time_burst)?,
        operations: rate(config.ops_size, config.ops_refill_time, config.ops_one_time_burst)?,
    })
}

fn agrees<T: PartialEq + std::fmt::Debug>(kind: &str, field: &str, given: Option<T>, is: T) -> Result<(), Error> {
    match given {
        Some(given) if given != is => Err(Error::Incompatible(format!(
            "{kind}: {field} was given as {given:?}, but the guest's is {is:?}"
        ))),
        _ => Ok(()),
    }
}

fn nowhere(kind: &str, say: &str) -> Error {
    Error::Incompatible(format!("{kind}: say where it is on this host: {say}"))
}
