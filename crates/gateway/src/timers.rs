//! Timeouts of one worker, cheap to set and clear.
//!
//! A request sets several timeouts and almost none expires, so nothing is registered with the runtime: setting one writes a number
//! into a slot, and one sweeper per worker sleeps until the earliest deadline that it saw. A timeout may therefore fire up to a
//! quarter of a second late, never early.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

const NEVER: u64 = u64::MAX;
/// Deadlines this close together are served by one sweep.
const GRAIN_MS: u64 = 250;

/// The timeouts of one worker. Clones share them.
#[derive(Clone, Debug)]
pub struct Timers {
    inner: Rc<Inner>,
}

#[derive(Debug)]
struct Inner {
    epoch: Instant,
    slots: RefCell<Slots>,
    /// When the sweeper looks next.
    planned: Cell<u64>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct Slots {
    list: Vec<Slot>,
    free: Vec<usize>,
}

#[derive(Debug)]
struct Slot {
    deadline: u64,
    waker: Option<Waker>,
}

impl Timers {
    /// No timeouts yet; [`sweep`](Timers::sweep) must run for any to fire.
    pub fn new() -> Timers {
        Timers {
            inner: Rc::new(Inner {
                epoch: Instant::now(),
                slots: RefCell::default(),
                planned: Cell::new(NEVER),
                wake: Notify::new(),
            }),
        }
    }

    /// Milliseconds since the worker started.
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.inner.epoch.elapsed().as_millis()).unwrap_or(NEVER - 1)
    }

    /// A timer that is not set.
    pub fn timer(&self) -> Timer {
        let mut slots = self.inner.slots.borrow_mut();
        let slot = Slot { deadline: NEVER, waker: None };
        let key = match slots.free.pop() {
            Some(key) => {
                slots.list[key] = slot;
                key
            }
            None => {
                slots.list.push(slot);
                slots.list.len() - 1
            }
        };
        drop(slots);
        Timer { timers: self.clone(), key }
    }

    /// A timer that is set.
    pub fn after(&self, duration: Duration) -> Timer {
        let timer = self.timer();
        timer.set(duration);
        timer
    }

    /// Fires timeouts, for ever.
    pub async fn sweep(self) {
        loop {
            let planned = self.inner.planned.get();
            if planned == NEVER {
                self.inner.wake.notified().await;
                continue;
            }
            let now = self.now_ms();
            if now < planned {
                let sleep = tokio::time::sleep(Duration::from_millis((planned - now).max(GRAIN_MS)));
                tokio::select! {
                    () = sleep => {}
                    () = self.inner.wake.notified() => {}
                }
                continue;
            }
            let mut earliest = NEVER;
            let mut due = Vec::new();
            for slot in &mut self.inner.slots.borrow_mut().list {
                if slot.deadline <= now {
                    due.extend(slot.waker.take());
                } else {
                    earliest = earliest.min(slot.deadline);
                }
            }
            self.inner.planned.set(earliest);
            for waker in due {
                waker.wake();
            }
        }
    }
}

/// One timeout, set and cleared by its owner.
#[derive(Debug)]
pub struct Timer {
    timers: Timers,
    key: usize,
}

impl Timer {
    /// Starts anew: it expires after `duration` from now.
    pub fn set(&self, duration: Duration) {
        let inner = &self.timers.inner;
        let deadline = self.timers.now_ms() + u64::try_from(duration.as_millis()).unwrap_or(NEVER / 2);
        inner.slots.borrow_mut().list[self.key].deadline = deadline;
        if deadline < inner.planned.get() {
            inner.planned.set(deadline);
            inner.wake.notify_one();
        }
    }

    /// Stops it.
    pub fn clear(&self) {
        let slot = &mut self.timers.inner.slots.borrow_mut().list[self.key];
        slot.deadline = NEVER;
        slot.waker = None;
    }

    /// Whether it is set, expired or not.
    pub fn is_set(&self) -> bool {
        self.timers.inner.slots.borrow().list[self.key].deadline != NEVER
    }

    /// Ready once it has expired; otherwise the task is woken then.
    pub fn poll_expired(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut slots = self.timers.inner.slots.borrow_mut();
        let slot = &mut slots.list[self.key];
        if slot.deadline == NEVER {
            return Poll::Pending;
        }
        if slot.deadline <= self.timers.now_ms() {
            return Poll::Ready(());
        }
        match &slot.waker {
            Some(waker) if waker.will_wake(cx.waker()) => {}
            _ => slot.waker = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// Runs `future` until the timer expires; `None` then. The future may set the timer again meanwhile.
    pub async fn limit<F: Future>(&self, future: F) -> Option<F::Output> {
        let mut future = pin!(future);
        std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending => self.poll_expired(cx).map(|()| None),
        })
        .await
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let mut slots = self.timers.inner.slots.borrow_mut();
        slots.list[self.key] = Slot { deadline: NEVER, waker: None };
        slots.free.push(self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn timers_expire_once_set_and_not_when_cleared() {
        let timers = Timers::new();
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let sweeper = tokio::task::spawn_local(timers.clone().sweep());
                let timer = timers.timer();
                assert!(!timer.is_set());
                assert_eq!(timer.limit(async { 1 }).await, Some(1));
                let start = Instant::now();
                timer.set(Duration::from_millis(30));
                assert_eq!(timer.limit(std::future::pending::<()>()).await, None);
                assert!(start.elapsed() >= Duration::from_millis(30));
                timer.clear();
                let other = timers.after(Duration::from_millis(10));
                let first = tokio::select! {
                    _ = timer.limit(std::future::pending::<()>()) => "cleared",
                    _ = other.limit(std::future::pending::<()>()) => "set",
                };
                assert_eq!(first, "set");
                drop((timer, other));
                assert_eq!(timers.inner.slots.borrow().free.len(), 2, "slots are used again");
                sweeper.abort();
            })
            .await;
    }
}
