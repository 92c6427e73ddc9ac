//! How much memory a piece of code used at a time, counted by the allocator.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    sync::atomic::{AtomicIsize, Ordering},
};

thread_local! {
    /// Bytes that this thread allocated and that nobody freed on this thread.
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

/// The same for all threads.
static LIVE_ALL: AtomicIsize = AtomicIsize::new(0);
static PEAK_ALL: AtomicIsize = AtomicIsize::new(0);

/// The system's allocator, counting. A test binary makes it its own:
///
/// ```text
/// #[global_allocator]
/// static ALLOCATOR: fuzz::memory::Counting = fuzz::memory::Counting;
/// ```
#[derive(Debug)]
pub struct Counting;

impl Counting {
    fn note(change: isize) {
        // The thread may be ending; then nobody measures on it.
        let _ = LIVE.try_with(|live| {
            live.set(live.get() + change);
            let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
        });
        let all = LIVE_ALL.fetch_add(change, Ordering::Relaxed) + change;
        if change > 0 {
            PEAK_ALL.fetch_max(all, Ordering::Relaxed);
        }
    }
}

// SAFETY: everything is left to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::note(layout.size() as isize);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::note(layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        Self::note(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both may exist for a moment.
        Self::note(size as isize);
        // SAFETY: as above.
        let moved = unsafe { System.realloc(pointer, layout, size) };
        Self::note(-(layout.size() as isize));
        moved
    }
}

/// Most bytes that `run` had allocated on this thread at a time, beyond what was there before.
pub fn peak_of(run: impl FnOnce()) -> usize {
    let before = LIVE.get();
    PEAK.set(before);
    run();
    usize::try_from(PEAK.get() - before).unwrap_or(0)
}

/// Bytes that all threads have allocated now.
pub fn live_bytes() -> usize {
    usize::try_from(LIVE_ALL.load(Ordering::Relaxed)).unwrap_or(0)
}

/// Most bytes that all threads had allocated at a time since the last call.
pub fn take_peak_bytes() -> usize {
    usize::try_from(PEAK_ALL.swap(LIVE_ALL.load(Ordering::Relaxed), Ordering::Relaxed)).unwrap_or(0)
}

/// Whether [`Counting`] is this program's allocator.
pub fn is_counting() -> bool {
    peak_of(|| drop(std::hint::black_box(vec![0u8; 4096]))) >= 4096
}
