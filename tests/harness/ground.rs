//! What services stand on: addresses, and disks. By default the loopback address and plain folders; as root also
//! a network namespace and a small file system for each.

use crate::{network::Fabric, processes::free_ports, small_disk::SmallDisk};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// The port of every service that has an address of its own.
const PORT: u16 = 7_400;

/// Networks and disks of the services of one cluster. Dropping it removes what it made.
#[derive(Debug, Default)]
pub struct Ground {
    fabric: Option<Fabric>,
    disk_bytes: Option<u64>,
    hosts: BTreeMap<String, usize>,
    disks: BTreeMap<String, SmallDisk>,
}

/// Where one service runs.
#[derive(Clone, Debug)]
pub struct Place {
    /// What it listens on.
    pub listen: String,
    /// How others reach it.
    pub uri: String,
    /// Its network, if it has one of its own.
    pub namespace: Option<PathBuf>,
    /// Its data folder.
    pub data: PathBuf,
}

impl Ground {
    /// A network for each service, and a disk of so many bytes for each.
    ///
    /// # Errors
    /// In words, when this machine or user cannot.
    pub fn apart(disk_bytes: u64) -> Result<Self, String> {
        let fabric = Fabric::make()?;
        let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
        drop(SmallDisk::make(&folder.path().join("image"), &folder.path().join("mount"), 16 << 20)?);
        Ok(Self { fabric: Some(fabric), disk_bytes: Some(disk_bytes), ..Self::default() })
    }

    /// A place for a service.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn place(&mut self, name: &str, folder: &Path) -> Place {
        let data = folder.join(name);
        if let Some(bytes) = self.disk_bytes {
            let disk = SmallDisk::make(&image(folder, name), &data, bytes);
            self.disks
                .insert(name.to_owned(), disk.unwrap_or_else(|why| panic!("the disk of {name}: {why}")));
        }
        let (address, port, namespace) = match &mut self.fabric {
            Some(fabric) => {
                let host = fabric.add_host();
                self.hosts.insert(name.to_owned(), host);
                (fabric.address(host), PORT, Some(fabric.namespace(host)))
            }
            None => ("127.0.0.1".to_owned(), free_ports(1)[0], None),
        };
        Place {
            listen: format!("{address}:{port}"),
            uri: format!("http://{address}:{port}"),
            namespace,
            data,
        }
    }

    /// Removes what a service stood on. It must have ended.
    pub fn remove(&mut self, name: &str, folder: &Path) {
        self.disks.remove(name);
        if let (Some(fabric), Some(host)) = (&mut self.fabric, self.hosts.remove(name)) {
            fabric.remove_host(host);
        }
        let _ = fs::remove_dir_all(folder.join(name));
    }

    /// The network, if the services have networks of their own.
    pub fn network(&self) -> Option<&Fabric> {
        self.fabric.as_ref()
    }

    /// The host of a service on that network.
    ///
    /// # Panics
    /// When it has none.
    pub fn host(&self, name: &str) -> usize {
        *self.hosts.get(name).unwrap_or_else(|| panic!("{name} has no network of its own"))
    }

    /// The disk of a service, if it has one of its own.
    pub fn disk(&self, name: &str) -> Option<&SmallDisk> {
        self.disks.get(name)
    }
}

fn image(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.image"))
}
