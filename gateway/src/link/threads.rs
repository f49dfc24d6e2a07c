//! Threads for links whose engine has a lane. Each runs the tasks of its links alone: a runtime that moves a task between its threads
//! has both wake for each burst of completions, because the kernel tells of one in the thread that asked for it.
//!
//! Used by [`link`](super). Must not know: what a link does. `bounded`: as many threads as processors, each started when a link
//! needs it.

use super::staying::{self, Taken};
use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Context;
use tokio::runtime::{Builder, Handle};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::warn;

/// The threads of a gateway. They end when it is dropped.
pub(crate) struct LaneThreads {
    threads: Mutex<Vec<LaneThread>>,
    /// They may [stay](staying) on their processors, one on each.
    may_stay: bool,
    taken: Taken,
}

struct LaneThread {
    runtime: Handle,
    links: Arc<AtomicUsize>,
    #[allow(dead_code, reason = "held for its drop")]
    end: DropGuard,
}

/// A link's place in a thread.
struct Place(Arc<AtomicUsize>);

/// Wakes a task again, but not before everything else that is ready on its thread, sockets and timers too, has had its turn.
pub(super) fn let_others(cx: &mut Context<'_>) {
    // A task that wakes itself is polled dozens of times before its thread looks at what is ready. A future that is dropped when
    // it has yielded has handed its waker on.
    let _ = pin!(tokio::task::yield_now()).poll(cx);
}

impl LaneThreads {
    /// None yet; those to come may stay on their processors if `may_stay`.
    pub(crate) fn new(may_stay: bool) -> Self {
        Self { threads: Mutex::default(), may_stay, taken: Taken::default() }
    }

    /// Runs a link's future on the thread that has the fewest; here if there is none to be had. `None` if it panicked.
    pub(super) async fn run<F>(&self, link: F) -> Option<F::Output>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        match self.place() {
            Ok((runtime, place)) => {
                let served = runtime.spawn(async move {
                    let output = link.await;
                    drop(place);
                    output
                });
                served.await.ok()
            }
            Err(error) => {
                warn!(%error, "no thread is left for a link, it is served beside others");
                Some(link.await)
            }
        }
    }

    fn place(&self) -> io::Result<(Handle, Place)> {
        let most = std::thread::available_parallelism().map_or(1, usize::from);
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let load = |thread: &LaneThread| thread.links.load(Ordering::Relaxed);
        let all_busy = threads.iter().all(|thread| load(thread) > 0);
        if all_busy && threads.len() < most {
            match LaneThread::start(threads.len(), self.may_stay.then(|| self.taken.clone())) {
                Ok(thread) => threads.push(thread),
                Err(error) if threads.is_empty() => return Err(error),
                Err(error) => warn!(%error, threads = threads.len(), "no further thread for links"),
            }
        }
        let least = threads.iter().min_by_key(|thread| load(thread));
        let thread = least.ok_or(io::ErrorKind::NotFound)?;
        thread.links.fetch_add(1, Ordering::Relaxed);
        Ok((thread.runtime.clone(), Place(Arc::clone(&thread.links))))
    }
}

impl LaneThread {
    fn start(number: usize, may_stay: Option<Taken>) -> io::Result<Self> {
        let mut builder = Builder::new_current_thread();
        if may_stay.is_some() {
            builder.on_thread_start(staying::not_with_its_parent());
        }
        let runtime = builder.enable_all().build()?;
        let (handle, end) = (runtime.handle().clone(), CancellationToken::new());
        let ended = end.clone();
        let thread = std::thread::Builder::new().name(format!("lane-{number}"));
        thread.spawn(move || {
            if let Some(taken) = may_stay {
                staying::allow(taken);
            }
            runtime.block_on(ended.cancelled());
        })?;
        Ok(Self { runtime: handle, links: Arc::default(), end: end.drop_guard() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn links_are_spread_over_threads_and_leave_them() {
        let threads = Arc::new(LaneThreads::new(true));
        let most = std::thread::available_parallelism().map_or(1, usize::from);
        let mut links = Vec::new();
        for _ in 0..most {
            let (started, name) = oneshot::channel();
            let (end, ended) = oneshot::channel::<()>();
            let all = Arc::clone(&threads);
            let link = tokio::spawn(async move {
                let link = async move {
                    let name = std::thread::current().name().map(str::to_owned);
                    started.send(name).expect("is waited for");
                    ended.await.expect("is told to end");
                };
                all.run(link).await
            });
            links.push((name.await.expect("starts"), end, link));
        }
        let mut names: Vec<_> = links.iter().map(|(name, ..)| name.clone().expect("has a name")).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), most, "one each: {names:?}");
        for (_, end, link) in links {
            end.send(()).expect("listens");
            assert_eq!(link.await.expect("ends"), Some(()));
        }
        let name = threads.run(async { std::thread::current().name().map(str::to_owned) }).await;
        assert!(name.flatten().is_some_and(|name| names.contains(&name)), "no more threads than processors");
        assert_eq!(threads.threads.lock().expect("whole").len(), most);
    }

    /// How often a busy task is polled until another one of its thread has heard of a byte.
    async fn polls_until_heard(threads: &LaneThreads) -> usize {
        let polls = Arc::new(AtomicUsize::new(0));
        let (busy, counted) = (Arc::clone(&polls), Arc::clone(&polls));
        let link = async move {
            // Its thread's: nobody else looks whether it is ready.
            let (mut ours, mut theirs) = tokio::net::UnixStream::pair().expect("a pair");
            let end = CancellationToken::new();
            let ended = end.clone();
            let busy = tokio::spawn(std::future::poll_fn(move |cx| {
                busy.fetch_add(1, Ordering::Relaxed);
                if ended.is_cancelled() {
                    return std::task::Poll::Ready(());
                }
                let_others(cx);
                std::task::Poll::Pending
            }));
            let mut byte = [0];
            theirs.write_all(&byte).await.expect("writes");
            let before = counted.load(Ordering::Relaxed);
            ours.read_exact(&mut byte).await.expect("reads");
            let polls = counted.load(Ordering::Relaxed) - before;
            end.cancel();
            busy.await.expect("ends");
            polls
        };
        threads.run(link).await.expect("does not panic")
    }

    #[tokio::test]
    async fn a_busy_link_lets_its_neighbours_hear_their_bells() {
        let threads = LaneThreads::new(true);
        for _ in 0..20 {
            let polls = polls_until_heard(&threads).await;
            assert!(polls <= 4, "polls={polls}");
        }
    }

    #[tokio::test]
    async fn what_blocks_does_not_stay_with_its_thread() {
        use rustix::thread::sched_getaffinity;
        let threads = LaneThreads::new(true);
        let processors = || sched_getaffinity(None).expect("is told").count();
        let link = async move {
            let mut share = staying::Share::new(Default::default());
            let start = Instant::now();
            for waited in [0, 100] {
                share.heed(staying::Moment::Ended, 1, start + Duration::from_millis(waited));
            }
            (processors(), tokio::task::spawn_blocking(processors).await.expect("does not panic"))
        };
        let (here, blocking) = threads.run(link).await.expect("does not panic");
        assert_eq!((here, blocking), (1, processors()));
    }

    #[tokio::test]
    async fn a_link_that_panics_takes_no_other_with_it() {
        let threads = LaneThreads::new(true);
        assert_eq!(threads.run(async { panic!("a link that panics") }).await, None::<()>);
        assert_eq!(threads.run(async { 1 }).await, Some(1));
        assert!(
            threads.threads.lock().expect("whole").iter().all(|one| one.links.load(Ordering::Relaxed) == 0)
        );
    }
}
