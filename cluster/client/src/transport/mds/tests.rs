//! Tests of the metadata client that need no server: errors name addresses, answers are checked.

use super::*;
use spline_types::Fault;

fn mds(addresses: &[&str]) -> Mds {
    let config =
        ClientConfig { mds: addresses.iter().map(|&a| a.into()).collect(), ..ClientConfig::default() };
    Mds::new(&config, Arc::new(Metrics::register(&mut prometheus_client::registry::Registry::default())))
}

#[tokio::test]
async fn when_nobody_answers_each_address_is_named() {
    // Bound and dropped, so that nobody listens there.
    let free = || std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("binds");
    let (first, second) = (free().to_string(), free().to_string());
    let error = mds(&[&first, &second, "no address"]).routes(&[]).await.expect_err("nobody there");
    let text = error.to_string();
    assert!(text.contains(&first) && text.contains(&second) && text.contains("write host:port"), "{text}");
    assert!(matches!(error.fault(), Fault::Unavailable(_)));
    let text = mds(&[]).routes(&[]).await.expect_err("none").to_string();
    assert!(text.contains("no address is configured"), "{text}");
}

#[test]
fn refusals_keep_the_words_and_name_the_server() {
    let status = Status::failed_precondition("volume is open elsewhere: gateway=g1");
    let error = refused("mds1:6700", &status);
    assert_eq!(error.fault(), Fault::Fenced);
    assert_eq!(error.to_string(), "volume is open elsewhere: gateway=g1 (mds=mds1:6700)");
    assert!(matches!(refused("a:1", &Status::not_found("x")), MetaError::NotFound { .. }));
    assert!(matches!(refused("a:1", &Status::already_exists("x")), MetaError::Replaced { .. }));
}

#[test]
fn answers_are_checked() {
    let volume = pb::Volume { id: 3, size_bytes: 1 << 30, block_size: 4096, ..Default::default() };
    let segment = pb::Segment { index: 1, copysets: vec![7; 64] };
    let reply = pb::OpenSessionReply {
        volume: Some(volume),
        epoch: 9,
        lease_ms: 10_000,
        segments: vec![segment],
        run_since: 4,
    };
    let good = opened(reply.clone()).expect("fine");
    assert_eq!(
        (good.volume, good.epoch, good.run_since, good.lease),
        (VolumeId::new(3), Epoch::new(9), Epoch::new(4), Duration::from_secs(10))
    );
    assert_eq!(good.segments[&SegmentIndex::new(1)].len(), 64);
    assert!(opened(pb::OpenSessionReply { volume: None, ..reply.clone() }).is_err());
    for run_since in [0, 10] {
        let odd = opened(pb::OpenSessionReply { run_since, ..reply.clone() }).expect_err("no such run");
        assert!(odd.contains(&format!("run_since={run_since}")), "{odd}");
    }
    let mut short = reply.clone();
    short.segments[0].copysets.pop();
    assert!(opened(short).expect_err("63 copysets").contains("copysets=63"));
    let mut odd = reply;
    odd.volume.as_mut().expect("set").block_size = 1000;
    assert!(opened(odd).expect_err("odd").contains("block_size=1000"));
}
