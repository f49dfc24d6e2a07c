//! Sessions after an upgrade that was given up: served and listed until they are opened anew, a few at once, and given back if they
//! end before.

use super::*;

/// A process with these volumes at a metadata server that hangs. They are in doubt.
async fn in_doubt(names: &[String]) -> (Side, Reopening, CancellationToken) {
    let side = Side::new(None);
    for name in names {
        side.serve(name, 4, true).await;
    }
    side.metadata.answers.forget_permits(usize::MAX);
    let leaving = CancellationToken::new();
    let reopening = Reopening::new(Arc::clone(&side.links), TaskTracker::new(), leaving.clone());
    reopening.begin(side.registry.sessions());
    (side, reopening, leaving)
}

impl Side {
    /// Waits until the metadata server was asked so often.
    async fn asked(&self, count: usize) {
        self.metadata.asked.subscribe().wait_for(|asked| *asked >= count).await.expect("lives");
    }
}

/// Lets everything run that can.
async fn settle() {
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_session_is_listed_and_joined_while_the_metadata_server_hangs() {
    let (side, reopening, _) = in_doubt(&["disk".into()]).await;
    side.asked(1).await;
    assert_eq!(side.served(), [("disk".to_owned(), 4)]);
    assert_eq!(side.join("disk").now_or_never(), Some(4), "at once");
    side.metadata.answers.add_permits(1);
    reopening.ended().await;
    assert_eq!(side.served(), [("disk".to_owned(), 9)]);
    assert_eq!(side.log(), ["open disk@9", "leave disk@4", "release disk@4"]);
}

#[tokio::test]
async fn a_metadata_server_is_asked_for_a_few_sessions_at_once() {
    let names: Vec<String> = (0..40).map(|number| format!("disk{number}")).collect();
    let (side, reopening, _) = in_doubt(&names).await;
    side.asked(16).await;
    settle().await;
    assert_eq!(*side.metadata.asked.borrow(), 16);
    side.metadata.answers.add_permits(1);
    side.asked(17).await;
    settle().await;
    assert_eq!(*side.metadata.asked.borrow(), 17, "the next one's turn");
    side.metadata.answers.add_permits(39);
    reopening.ended().await;
    assert!(side.served().len() == 40 && side.served().iter().all(|(_, epoch)| *epoch == 9));
}

#[tokio::test]
async fn a_session_that_ends_in_doubt_is_given_back() {
    let (side, reopening, _) = in_doubt(&["disk".into()]).await;
    side.asked(1).await;
    let name = "disk".parse().expect("a name");
    let close = async {
        // What is asked for already is waited for: none comes after the last.
        side.metadata.answers.add_permits(2);
        assert!(side.registry.close_volume(&name).await);
    };
    let ((), ()) = tokio::join!(close, reopening.ended());
    assert_eq!(side.served(), []);
    let mut told = side.log();
    assert_eq!(told.last().map(String::as_str), Some("close disk@9"), "{told:?}");
    told.retain(|told| told != "open disk@9");
    told.sort();
    assert_eq!(told, ["close disk@9", "close disk@9", "release disk@4"], "whichever is the newest is closed");
    assert_eq!(side.links.metrics.sessions_lost.get(), 0);
}

#[tokio::test]
async fn a_session_that_ends_while_it_waits_to_be_opened_anew_is_given_back() {
    let (side, reopening, leaving) = in_doubt(&["disk".into()]).await;
    side.metadata.away.store(true, Ordering::Release);
    side.metadata.answers.add_permits(1);
    side.asked(1).await;
    // This process is to stop.
    leaving.cancel();
    reopening.ended().await;
    side.metadata.away.store(false, Ordering::Release);
    side.metadata.answers.add_permits(1);
    assert!(side.registry.close_volume(&"disk".parse().expect("a name")).await);
    assert_eq!(side.log(), ["release disk@4", "open disk@9", "close disk@9"]);
}

#[tokio::test]
async fn a_metadata_server_that_hangs_does_not_keep_a_volume_from_being_closed() {
    let (side, _reopening, leaving) = in_doubt(&["disk".into()]).await;
    side.asked(1).await;
    leaving.cancel();
    let name = "disk".parse().expect("a name");
    let closed = tokio::time::timeout(Duration::from_secs(60), side.registry.close_volume(&name)).await;
    assert!(closed.expect("is given up"));
    assert_eq!(side.log(), ["release disk@4", "close disk@4"], "which may still be the newest");
}

#[tokio::test]
async fn a_session_that_another_gateway_has_taken_is_counted_as_lost() {
    let (side, reopening, _) = in_doubt(&["disk".into(), "other".into()]).await;
    side.metadata.held.store(true, Ordering::Release);
    side.metadata.answers.add_permits(2);
    reopening.ended().await;
    let mut told = side.log();
    told.sort();
    assert_eq!(told, ["close disk@4", "close other@4", "leave disk@4", "leave other@4"]);
    assert_eq!(side.served(), []);
    assert_eq!(side.links.metrics.sessions_lost.get(), 2);
    // One that ends by itself finds out the same way.
    let (side, reopening, leaving) = in_doubt(&["disk".into()]).await;
    leaving.cancel();
    reopening.ended().await;
    side.metadata.held.store(true, Ordering::Release);
    side.metadata.answers.add_permits(1);
    assert!(side.registry.close_volume(&"disk".parse().expect("a name")).await);
    assert_eq!((side.log(), side.links.metrics.sessions_lost.get()), (vec!["release disk@4".to_owned()], 1));
}
