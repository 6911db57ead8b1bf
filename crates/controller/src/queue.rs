//! Work queues: a key is worked on by one worker at a time, waits once however often it is added, and is retried with backoff.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::metrics::{Metrics, QueueName};

/// What a worker's round ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing to do until something changes.
    Wait,
    /// Look again after this long even if nothing changes.
    After(Duration),
}

/// The namespace and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Empty for cluster-scoped objects.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl Key {
    /// Of a namespace and a name.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Key {
        Key { namespace: namespace.into(), name: name.into() }
    }

    /// Of an object.
    pub fn of<K: kube::Resource>(object: &K) -> Key {
        let meta = object.meta();
        Key::new(meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
    }
}

struct State<K> {
    /// With the time since when each has waited.
    waiting: VecDeque<(K, Instant)>,
    /// In `waiting`, or to be put there when its worker is done.
    dirty: HashSet<K>,
    working: HashSet<K>,
    delayed: HashMap<K, Instant>,
    failures: HashMap<K, u32>,
}

struct Inner<K> {
    name: &'static str,
    state: Mutex<State<K>>,
    notify: Notify,
    clock: Clock,
    depth: Gauge,
    adds: Counter,
    retries: Counter,
    waited: Histogram,
    worked: Histogram,
}

/// A queue of keys. Cloning shares it.
pub struct Queue<K>(Arc<Inner<K>>);

impl<K> Clone for Queue<K> {
    fn clone(&self) -> Self {
        Queue(self.0.clone())
    }
}

/// The first retry; doubled each time (client-go's workqueue).
const FIRST_RETRY: Duration = Duration::from_millis(5);
/// The longest pause between retries.
const LAST_RETRY: Duration = Duration::from_secs(60);

const POISONED: &str = "no worker panics while it holds the queue lock";

impl<K: Clone + Eq + Hash + Debug + Send + Sync + 'static> Queue<K> {
    /// An empty queue that goes by the machine's clock and whose measurements nobody sees; `name` is for the log.
    pub fn new(name: &'static str) -> Queue<K> {
        Queue::measured(name, Clock::default(), &Metrics::default())
    }

    /// An empty queue, measured under its name.
    pub(crate) fn measured(name: &'static str, clock: Clock, metrics: &Metrics) -> Queue<K> {
        let label = QueueName { name };
        Queue(Arc::new(Inner {
            clock,
            depth: metrics.depth.get_or_create_owned(&label),
            adds: metrics.adds.get_or_create_owned(&label),
            retries: metrics.retries.get_or_create_owned(&label),
            waited: metrics.queue_duration.get_or_create_owned(&label),
            worked: metrics.work_duration.get_or_create_owned(&label),
            name,
            state: Mutex::new(State {
                waiting: VecDeque::new(),
                dirty: HashSet::new(),
                working: HashSet::new(),
                delayed: HashMap::new(),
                failures: HashMap::new(),
            }),
            notify: Notify::new(),
        }))
    }

    /// Has the key worked on soon.
    pub fn add(&self, key: K) {
        let mut state = self.0.state.lock().expect(POISONED);
        if !state.dirty.insert(key.clone()) {
            return;
        }
        self.0.adds.inc();
        if !state.working.contains(&key) {
            state.waiting.push_back((key, Instant::now()));
            self.0.depth.set(i64::try_from(state.waiting.len()).unwrap_or(i64::MAX));
            drop(state);
            self.0.notify.notify_one();
        }
    }

    /// Has the key worked on after a pause, unless that happens earlier by a call of the same kind.
    pub fn add_after(&self, key: K, pause: Duration) {
        self.add_at(key, self.0.clock.instant() + pause);
    }

    fn add_at(&self, key: K, due: Instant) {
        {
            let mut state = self.0.state.lock().expect(POISONED);
            if state.delayed.get(&key).is_some_and(|known| *known <= due) {
                return;
            }
            state.delayed.insert(key.clone(), due);
        }
        let queue = self.clone();
        tokio::spawn(async move {
            queue.0.clock.sleep_until(due).await;
            {
                let mut state = queue.0.state.lock().expect(POISONED);
                if state.delayed.get(&key) != Some(&due) {
                    return; // An earlier call took its place.
                }
                state.delayed.remove(&key);
            }
            queue.add(key);
        });
    }

    fn next(&self) -> Option<K> {
        let mut state = self.0.state.lock().expect(POISONED);
        let (key, since) = state.waiting.pop_front()?;
        self.0.depth.set(i64::try_from(state.waiting.len()).unwrap_or(i64::MAX));
        self.0.waited.observe(since.elapsed().as_secs_f64());
        state.dirty.remove(&key);
        state.working.insert(key.clone());
        Some(key)
    }

    /// The next key, as soon as there is one; `None` at shutdown.
    async fn wait(&self, shutdown: &CancellationToken) -> Option<K> {
        loop {
            // Registered before looking, so that no notification is missed, and given up with the return, so that none is
            // kept from an idle worker while this one is busy.
            let mut notified = std::pin::pin!(self.0.notify.notified());
            notified.as_mut().enable();
            if shutdown.is_cancelled() {
                return None;
            }
            if let Some(key) = self.next() {
                return Some(key);
            }
            tokio::select! {
                () = shutdown.cancelled() => return None,
                () = notified => {}
            }
        }
    }

    /// Takes out all that waits, as if it had been worked on.
    #[cfg(test)]
    pub(crate) fn drain(&self) -> Vec<K> {
        let mut keys = Vec::new();
        while let Some(key) = self.next() {
            self.done(key.clone(), Ok(Next::Wait), self.0.clock.instant());
            keys.push(key);
        }
        keys
    }

    /// `began` is when the sync was begun by the queue's clock: from then pauses count, so that a clock put forward meanwhile counts.
    fn done(&self, key: K, result: anyhow::Result<Next>, began: Instant) {
        let after = {
            let mut state = self.0.state.lock().expect(POISONED);
            state.working.remove(&key);
            if state.dirty.contains(&key) {
                state.waiting.push_back((key.clone(), Instant::now()));
                self.0.depth.set(i64::try_from(state.waiting.len()).unwrap_or(i64::MAX));
                self.0.notify.notify_one();
            }
            match result {
                Ok(next) => {
                    state.failures.remove(&key);
                    match next {
                        Next::Wait => None,
                        Next::After(pause) => Some(pause),
                    }
                }
                Err(error) => {
                    self.0.retries.inc();
                    let failures = state.failures.entry(key.clone()).or_default();
                    *failures += 1;
                    let pause = backoff(*failures);
                    if is_transient(&error) {
                        tracing::debug!(queue = self.0.name, ?key, "will retry: {error:#}");
                    } else {
                        tracing::warn!(
                            queue = self.0.name,
                            ?key,
                            failures = *failures,
                            "sync failed, will retry: {error:#}"
                        );
                    }
                    Some(pause)
                }
            }
        };
        if let Some(pause) = after {
            self.add_at(key, began + pause);
        }
    }

    /// Runs `workers` workers until `shutdown`.
    pub async fn work<F, Fut>(&self, workers: usize, shutdown: CancellationToken, sync: F)
    where
        F: Fn(K) -> Fut + Clone + Send + 'static,
        Fut: Future<Output = anyhow::Result<Next>> + Send,
    {
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..workers {
            let (queue, shutdown, sync) = (self.clone(), shutdown.clone(), sync.clone());
            tasks.spawn(async move {
                while let Some(key) = queue.wait(&shutdown).await {
                    let (began, started) = (Instant::now(), queue.0.clock.instant());
                    let result = sync(key.clone()).await;
                    queue.0.worked.observe(began.elapsed().as_secs_f64());
                    queue.done(key, result, started);
                }
            });
        }
        while let Some(ended) = tasks.join_next().await {
            // A worker that is gone and the key it held would be missed by nobody.
            if let Err(error) = ended
                && error.is_panic()
            {
                std::panic::resume_unwind(error.into_panic());
            }
        }
    }
}

fn backoff(failures: u32) -> Duration {
    let doubled = FIRST_RETRY.saturating_mul(1u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX));
    doubled.min(LAST_RETRY)
}

/// Conflicts and vanished objects are part of normal operation: someone else was faster.
fn is_transient(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| match cause.downcast_ref::<kube::Error>() {
        Some(kube::Error::Api(status)) => status.code == 409 || status.code == 404,
        _ => cause.is::<Waiting>(),
    })
}

/// A sync that has to wait for something that will come by itself.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Waiting(pub String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_added_while_worked_on_comes_again_once() {
        let queue: Queue<&str> = Queue::new("test");
        queue.add("a");
        queue.add("a");
        assert_eq!(queue.next(), Some("a"));
        queue.add("a");
        queue.add("a");
        assert_eq!(queue.next(), None, "one worker at a time");
        queue.done("a", Ok(Next::Wait), Instant::now());
        assert_eq!(queue.next(), Some("a"));
        queue.done("a", Ok(Next::Wait), Instant::now());
        assert_eq!(queue.next(), None);
    }

    /// Works until `stop`; a key that is in `block` is worked on until it is taken out there.
    fn workers(queue: &Queue<u32>, count: usize, stop: &CancellationToken, block: u32) -> Worked {
        let worked = Worked { done: tokio::sync::watch::Sender::default(), release: CancellationToken::new() };
        let (seen, queue, stop) = (worked.clone(), queue.clone(), stop.clone());
        tokio::spawn(async move {
            let sync = move |key| {
                let seen = seen.clone();
                async move {
                    seen.done.send_modify(|done| done.push(key));
                    if key == block {
                        seen.release.cancelled().await;
                    }
                    Ok(Next::Wait)
                }
            };
            queue.work(count, stop, sync).await;
        });
        worked
    }

    #[derive(Clone)]
    struct Worked {
        /// Keys whose work has begun.
        done: tokio::sync::watch::Sender<Vec<u32>>,
        release: CancellationToken,
    }

    impl Worked {
        async fn reaches(&self, key: u32) {
            let mut done = self.done.subscribe();
            let begun = done.wait_for(|done| done.contains(&key));
            tokio::time::timeout(Duration::from_secs(20), begun).await.expect("worked on in time").unwrap();
        }
    }

    #[tokio::test]
    async fn what_comes_while_a_worker_is_busy_is_done_by_an_idle_one() {
        // Whichever of the workers is woken first.
        for first in 0..4 {
            let (queue, stop) = (Queue::new("test"), CancellationToken::new());
            let worked = workers(&queue, 3, &stop, 7);
            for key in 0..first {
                queue.add(key);
                worked.reaches(key).await;
            }
            queue.add(7);
            worked.reaches(7).await;
            for key in 10..20 {
                queue.add(key);
                worked.reaches(key).await;
            }
            worked.release.cancel();
            stop.cancel();
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_key_is_lost_between_busy_workers() {
        let (queue, stop) = (Queue::<u32>::new("test"), CancellationToken::new());
        let worked = workers(&queue, 3, &stop, u32::MAX);
        for key in 0..2_000 {
            match key % 3 {
                0 => queue.add(key),
                1 => queue.add_after(key, Duration::from_micros(u64::from(key))),
                _ => {
                    let queue = queue.clone();
                    tokio::spawn(async move { queue.add(key) });
                }
            }
        }
        for key in 0..2_000 {
            worked.reaches(key).await;
        }
        stop.cancel();
    }

    #[tokio::test]
    async fn an_earlier_time_takes_the_place_of_a_later_one() {
        let clock = Clock::default();
        let queue = Queue::<u32>::measured("test", clock.clone(), &Metrics::default());
        let stop = CancellationToken::new();
        let worked = workers(&queue, 1, &stop, u32::MAX);
        queue.add_after(1, Duration::from_secs(7_200));
        queue.add_after(1, Duration::from_secs(3_600));
        queue.add_after(1, Duration::from_secs(5_400));
        clock.advance(Duration::from_secs(3_601));
        worked.reaches(1).await;
        assert_eq!(worked.done.borrow().len(), 1);
        // The same time may be asked for again.
        queue.add_after(1, Duration::from_secs(10));
        clock.advance(Duration::from_secs(11));
        let mut done = worked.done.subscribe();
        let twice = done.wait_for(|done| done.len() == 2);
        tokio::time::timeout(Duration::from_secs(20), twice).await.expect("worked on in time").unwrap();
        stop.cancel();
    }

    #[tokio::test]
    async fn a_panic_of_a_sync_is_not_swallowed() {
        let queue = Queue::<u32>::new("test");
        queue.add(1);
        let work = {
            let queue = queue.clone();
            tokio::spawn(async move {
                queue.work(2, CancellationToken::new(), |_| async { panic!("a test of panics") }).await;
            })
        };
        let ended = tokio::time::timeout(Duration::from_secs(20), work).await.expect("ends");
        assert!(ended.unwrap_err().is_panic());
    }

    #[test]
    fn pauses_double_up_to_a_minute() {
        assert_eq!(backoff(1), Duration::from_millis(5));
        assert_eq!(backoff(4), Duration::from_millis(40));
        assert_eq!(backoff(40), LAST_RETRY);
    }
}
