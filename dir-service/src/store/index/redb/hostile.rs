//! Hostile bytes in the index's file.

use super::*;
use fuzz::Decoder;
use std::cell::Cell;

thread_local! {
    static IN_INDEX: Cell<bool> = const { Cell::new(false) };
}

/// Has panics in the index, which are contained, printed without a backtrace: what that reads of the program's symbols,
/// tens of MiB, would count as memory that the file's bytes took.
fn print_panics_plainly() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(
        move |panic| if IN_INDEX.get() { eprintln!("{panic}") } else { usual(panic) },
    ));
}

/// Opens a file with these bytes and reads everything in it.
fn use_index(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap();
    let Ok(Opened::Index(index)) =
        RedbIndex::open_now(path, 1 << 20).unwrap_or_else(|error| Err(failed(path, error)))
    else {
        return;
    };
    if let Ok(view) = index.view() {
        let _ = view.revision();
        let _ = view.scan(&KeyRange::all(), 1_000);
        let key = Key::from_static(b"key 7");
        let _ = view.get(&[&key]);
    }
    // Closing writes what a quick start needs.
    let _ = contained(path, || {
        drop(index.shared.database.write().take());
        Ok(())
    });
}

#[test]
fn hostile_index_files_are_unreadable_or_read() {
    print_panics_plainly();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index.redb");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let Ok(Opened::Index(index)) = RedbIndex::open(&path, 1 << 20).await else { panic!("no index") };
        index.reset("label".into()).await.unwrap();
        let put =
            |number: u64| Mutation::Put(format!("key {number}").into_bytes().into(), vec![7; 100].into());
        let changes = (1..60).map(|number| (Revision(number), vec![put(number)])).collect();
        index.apply(changes, Revision(60), true).await.unwrap();
        index.close().await;
    });
    let sample = std::fs::read(&path).unwrap();
    println!("an index of {} bytes", sample.len());
    // Of its pages only some carry content; mutants change where that is.
    let used: Vec<usize> = (0..sample.len()).filter(|at| sample[*at] != 0).collect();
    println!("{} of them are not zero", used.len());
    Decoder::new("index-file")
        .one_in(100)
        .memory(2, 32 << 20)
        .bytes_max(sample.len())
        .sample(&b"seed"[..])
        .run(|bytes| {
            // The sample is too large for the corpus: the input says where to change it, and to what.
            let mut file = sample.clone();
            for change in bytes.chunks_exact(4) {
                let at = u32::from_le_bytes([change[0], change[1], change[2], 0]) as usize;
                file[used[at % used.len()]] ^= change[3].max(1);
            }
            if bytes.len() % 7 == 3 {
                file.truncate(bytes.len() * 4_096 % file.len());
            }
            IN_INDEX.set(true);
            use_index(&path, &file);
            IN_INDEX.set(false);
        });
}
