//! A network of its own for each service: network namespaces, cables between them that can be cut.
//!
//! ```text
//!  this process                     hub: a bridge in a namespace          one namespace for each host
//!
//!  10.X.Y.1/24  cnAAAA --------- port0 ---+
//!                                       br0 ---+--- h0 ------------------ eth0  10.X.Y.2/24   host 0
//!                                              +--- h1 ------------------ eth0  10.X.Y.3/24   host 1
//! ```
//!
//! The bridge has a namespace of its own, so that this machine's firewall has no say in what passes it. A cut is a rule
//! in a host's namespace that silently drops packets: nobody gets a broken connection, as when a cable is pulled. Making
//! all this needs root; [`Fabric::make`] says why it cannot be done elsewhere. Dropping a fabric removes it.

use std::{
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
};

/// Attempts to find names and addresses that nobody uses.
const ATTEMPTS: usize = 5;

/// Which packets are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cut {
    /// Those that arrive and those that leave.
    Both,
    /// Those that arrive: the host speaks and hears nothing.
    Incoming,
    /// Those that leave: the host hears and says nothing.
    Outgoing,
}

/// Hosts on a network.
#[derive(Debug)]
pub struct Fabric {
    id: u16,
    net: (u8, u8),
    hosts: Vec<bool>,
}

impl Fabric {
    /// Makes a network without hosts.
    ///
    /// # Errors
    /// In words, when this machine or user cannot.
    pub fn make() -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("network namespaces need root".to_owned());
        }
        run(&["nft", "list", "tables"])?;
        let mut last = String::new();
        for _ in 0..ATTEMPTS {
            // Whatever was made of it goes when it is dropped.
            let fabric = Self {
                id: rand::random(),
                net: (rand::random_range(64..192), rand::random()),
                hosts: Vec::new(),
            };
            match fabric.lay() {
                Ok(()) => return Ok(fabric),
                Err(why) => last = why,
            }
        }
        Err(last)
    }

    fn lay(&self) -> Result<(), String> {
        let (hub, port) = (self.hub(), self.port());
        let prefix = format!("10.{}.{}.", self.net.0, self.net.1);
        if run(&["ip", "-4", "-o", "address"])?.contains(&prefix) {
            return Err(format!("{prefix}0/24 is in use"));
        }
        run(&["ip", "netns", "add", &hub])?;
        run(&["ip", "-n", &hub, "link", "add", "name", "br0", "type", "bridge"])?;
        run(&["ip", "-n", &hub, "link", "set", "br0", "up"])?;
        run(&["ip", "link", "add", &port, "type", "veth", "peer", "name", "port0", "netns", &hub])?;
        run(&["ip", "-n", &hub, "link", "set", "port0", "master", "br0", "up"])?;
        run(&["ip", "address", "add", &format!("{prefix}1/24"), "dev", &port])?;
        run(&["ip", "link", "set", &port, "up"])?;
        Ok(())
    }

    /// Adds a host; answers its number.
    ///
    /// # Panics
    /// When that fails, or there are 200 already.
    pub fn add_host(&mut self) -> usize {
        let number = self.hosts.len();
        assert!(number < 200, "{number} hosts are enough");
        self.hosts.push(true);
        let (hub, host, plug) = (self.hub(), self.name(number), format!("h{number}"));
        let add = || {
            run(&["ip", "netns", "add", &host])?;
            run(&[
                "ip", "-n", &hub, "link", "add", &plug, "type", "veth", "peer", "name", "eth0", "netns",
                &host,
            ])?;
            run(&["ip", "-n", &hub, "link", "set", &plug, "master", "br0", "up"])?;
            run(&[
                "ip",
                "-n",
                &host,
                "address",
                "add",
                &format!("{}/24", self.address(number)),
                "dev",
                "eth0",
            ])?;
            run(&["ip", "-n", &host, "link", "set", "lo", "up"])?;
            run(&["ip", "-n", &host, "link", "set", "eth0", "up"])
        };
        add().unwrap_or_else(|why: String| panic!("host {number}: {why}"));
        number
    }

    /// Removes a host for good. Its processes must have ended.
    pub fn remove_host(&mut self, number: usize) {
        if std::mem::replace(&mut self.hosts[number], false) {
            let _ = run(&["ip", "netns", "delete", &self.name(number)]);
        }
    }

    /// The address of a host, IPv4.
    pub fn address(&self, number: usize) -> String {
        format!("10.{}.{}.{}", self.net.0, self.net.1, number + 2)
    }

    /// The address of this process on the network.
    pub fn own_address(&self) -> String {
        format!("10.{}.{}.1", self.net.0, self.net.1)
    }

    /// Where processes of a host have their network.
    pub fn namespace(&self, number: usize) -> PathBuf {
        PathBuf::from("/run/netns").join(self.name(number))
    }

    /// Drops packets between a host and these addresses from now on, beside those that are dropped already.
    ///
    /// # Panics
    /// When the rules are refused.
    pub fn cut(&self, host: usize, peers: &[String], cut: Cut) {
        let mut rules = "add table ip cut\n\
             add chain ip cut in { type filter hook input priority 0; policy accept; }\n\
             add chain ip cut out { type filter hook output priority 0; policy accept; }\n"
            .to_owned();
        for peer in peers {
            if cut != Cut::Outgoing {
                rules.push_str(&format!("add rule ip cut in ip saddr {peer} drop\n"));
            }
            if cut != Cut::Incoming {
                rules.push_str(&format!("add rule ip cut out ip daddr {peer} drop\n"));
            }
        }
        self.rules(host, &rules);
    }

    /// Drops nothing at a host any more.
    ///
    /// # Panics
    /// When that is refused.
    pub fn mend(&self, host: usize) {
        self.rules(host, "flush ruleset\n");
    }

    fn rules(&self, host: usize, rules: &str) {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name(host), "nft", "-f", "-"]).stdin(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
        let ended = child.wait().unwrap();
        assert!(ended.success(), "nft refused at host {host}: {rules}");
    }

    fn hub(&self) -> String {
        format!("cairn-{:04x}-hub", self.id)
    }

    fn port(&self) -> String {
        format!("cn{:04x}", self.id)
    }

    fn name(&self, number: usize) -> String {
        format!("cairn-{:04x}-{number}", self.id)
    }
}

impl Drop for Fabric {
    fn drop(&mut self) {
        for number in 0..self.hosts.len() {
            self.remove_host(number);
        }
        let _ = run(&["ip", "link", "delete", &self.port()]);
        let _ = run(&["ip", "netns", "delete", &self.hub()]);
    }
}

/// Runs a command; answers its output, or why it failed.
pub(crate) fn run(words: &[&str]) -> Result<String, String> {
    let ended = Command::new(words[0])
        .args(&words[1..])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{}: {error}", words[0]))?;
    if ended.status.success() {
        Ok(String::from_utf8_lossy(&ended.stdout).into_owned())
    } else {
        Err(format!("{}: {}", words.join(" "), String::from_utf8_lossy(&ended.stderr).trim()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reaches(fabric: &Fabric, from: usize, to: &str) -> bool {
        // TCP to a port where nobody listens: refused at once when packets pass both ways, silence when not.
        let script = format!("exec 3<>/dev/tcp/{to}/9");
        let words = ["netns", "exec", &fabric.name(from), "timeout", "1", "bash", "-c", &script];
        let ended = Command::new("ip").args(words).stderr(Stdio::null()).status().unwrap();
        ended.code() == Some(1)
    }

    #[test]
    fn packets_pass_until_a_cable_is_cut() {
        let mut fabric = match Fabric::make() {
            Ok(fabric) => fabric,
            Err(why) => {
                println!("!!! SKIPPED: no network namespaces here: {why}");
                return;
            }
        };
        let (one, other) = (fabric.add_host(), fabric.add_host());
        let (at_one, at_other) = (fabric.address(one), fabric.address(other));
        assert!(reaches(&fabric, one, &at_other) && reaches(&fabric, other, &at_one));
        for cut in [Cut::Both, Cut::Incoming, Cut::Outgoing] {
            fabric.cut(one, std::slice::from_ref(&at_other), cut);
            assert!(!reaches(&fabric, one, &at_other), "{cut:?}");
            assert!(!reaches(&fabric, other, &at_one), "{cut:?}");
            assert!(reaches(&fabric, one, &fabric.own_address()), "{cut:?} is between these two alone");
            fabric.mend(one);
            assert!(reaches(&fabric, one, &at_other));
        }
    }
}
