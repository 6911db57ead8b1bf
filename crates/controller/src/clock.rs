//! The time that controllers go by: the machine's, which a test may put forward.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::Instant;

/// A clock that runs with the machine's, ahead of it by as much as it has been advanced. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Clock(Arc<watch::Sender<Duration>>);

impl Default for Clock {
    /// The machine's time.
    fn default() -> Clock {
        Clock(Arc::new(watch::Sender::new(Duration::ZERO)))
    }
}

impl Clock {
    /// Puts the clock forward. Whoever waits for a time that has come now is woken.
    pub fn advance(&self, by: Duration) {
        self.0.send_modify(|ahead| *ahead += by);
    }

    fn ahead(&self) -> Duration {
        *self.0.borrow()
    }

    /// The wall clock.
    pub fn now(&self) -> Timestamp {
        Timestamp::now().saturating_add(self.ahead()).unwrap_or(Timestamp::MAX)
    }

    /// A steady time for measuring how long something has lasted.
    pub fn instant(&self) -> Instant {
        Instant::now() + self.ahead()
    }

    /// How long ago `earlier` was, a value of [`Clock::instant`].
    pub fn since(&self, earlier: Instant) -> Duration {
        self.instant().saturating_duration_since(earlier)
    }

    /// Waits until `due`, a value of [`Clock::instant`].
    pub async fn sleep_until(&self, due: Instant) {
        let mut advanced = self.0.subscribe();
        loop {
            let left = due.saturating_duration_since(self.instant());
            if left.is_zero() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(left) => {}
                // The sender lives as long as self.
                _ = advanced.changed() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn advancing_wakes_who_waits() {
        let clock = Clock::default();
        let began = clock.instant();
        let waiting = tokio::spawn({
            let clock = clock.clone();
            async move { clock.sleep_until(began + Duration::from_secs(3600)).await }
        });
        clock.advance(Duration::from_secs(1800));
        assert!(
            tokio::time::timeout(Duration::from_millis(20), async {
                while !waiting.is_finished() {
                    tokio::task::yield_now().await
                }
            })
            .await
            .is_err()
        );
        clock.advance(Duration::from_secs(1801));
        tokio::time::timeout(Duration::from_secs(20), waiting).await.unwrap().unwrap();
        assert!(clock.since(began) >= Duration::from_secs(3600));
    }
}
