//! What `docs/reliability.md` counts, over real processes: few of each with every change, as many as are claimed when
//! the environment says so (`make reliability`).

mod flips;
mod healing;
mod holders;
mod members;

use tokio::sync::Mutex;

/// One test at a time has the machine: some measure, and all load it.
static ALONE: Mutex<()> = Mutex::const_new(());
