//! The state machine without raft: applied, checkpointed, restarted, copied to another server.

use super::*;
use crate::command::decode_answer;
use crate::store::{Disk, Pool};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use spline_types::{ChunkId, ChunkIndex, ChunkRange, Epoch, FenceTag, Seq, Unavailable, VolumeId};
use std::path::Path;

const COPYSET: CopysetId = CopysetId::new(4);

struct Replica {
    shared: Arc<Shared>,
    machine: CopysetMachine,
}

impl Replica {
    /// Opens what is in `dir`, as a start does.
    fn open(dir: &Path, pool: &Arc<Pool>) -> Self {
        if !dir.join(meta::FILE_NAME).exists() {
            Meta::default().save(dir, COPYSET).expect("is created");
        }
        let disk = Disk::new(Arc::clone(pool), 16, Counter::default());
        let (store, meta) = adoption::open(disk, COPYSET, dir).expect("opens");
        let metrics = Arc::new(Metrics::register(&mut Registry::default()));
        let shared = Arc::new(Shared::new(COPYSET, dir.to_owned(), store, meta, metrics));
        Self { machine: CopysetMachine::new(Arc::clone(&shared)), shared }
    }

    async fn apply(&mut self, index: u64, command: Command, payload: &'static [u8]) -> Result<(), Fault> {
        let entry = (at(index), command.encode(Bytes::from_static(payload)));
        let answers = self.machine.apply(vec![entry]).await.expect("applies");
        decode_answer(&answers[0])
    }

    async fn checkpoint(&mut self, index: u64) {
        let job = self.machine.begin_checkpoint();
        let membership = Bytes::from_static(b"members");
        job.run(Checkpoint { position: Some(at(index)), membership }).await.expect("is durable");
    }

    fn read(&self, chunk: ChunkId, length: u32) -> Vec<u8> {
        let range = ChunkRange::new(0, length).expect("inside");
        self.shared.store.read(chunk, range, Patience::Blocking).expect("reads")
    }
}

fn at(index: u64) -> LogPosition {
    LogPosition { term: 1, node: 1, index }
}

fn chunk(volume: u64, index: u32) -> ChunkId {
    ChunkId { volume: VolumeId::new(volume), index: ChunkIndex::new(index) }
}

fn write(chunk: ChunkId, epoch: u64, seq: u64, floor: u64, length: u32) -> Command {
    let fence = FenceTag { epoch: Epoch::new(epoch), seq: Seq::new(seq), floor: Seq::new(floor) };
    let range = ChunkRange::new(0, length).expect("inside");
    Command::Chunk(ChunkCommand { copyset: COPYSET, chunk, op: ChunkOp::Write, range, fence })
}

fn pool(dir: &Path) -> Arc<Pool> {
    Pool::open(&dir.join("pool"), 2, 0, 0).expect("pool")
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_after_a_crash_judges_and_writes_as_the_first_time() {
    let dir = tempfile::tempdir().expect("tempdir");
    let pool = pool(dir.path());
    let mut replica = Replica::open(dir.path(), &pool);
    let dead = Err(Fault::Unavailable(Unavailable::Unreachable));
    assert_eq!(replica.apply(1, write(chunk(1, 0), 1, 5, 1, 3), b"one").await, Ok(()));
    replica.checkpoint(1).await;
    assert_eq!(replica.apply(2, write(chunk(1, 0), 1, 6, 1, 3), b"two").await, Ok(()));
    assert_eq!(replica.apply(3, write(chunk(1, 0), 1, 8, 8, 4), b"8888").await, Ok(()));
    assert_eq!(replica.apply(4, write(chunk(1, 0), 1, 7, 1, 4), b"late").await, dead);
    drop(replica);

    let mut replica = Replica::open(dir.path(), &pool);
    assert_eq!(replica.machine.checkpoint().position, Some(at(1)));
    assert_eq!(replica.machine.checkpoint().membership[..], *b"members");
    // Had the fence of entry 3 survived, entry 2 would be refused here and this replica would differ.
    assert_eq!(replica.apply(2, write(chunk(1, 0), 1, 6, 1, 3), b"two").await, Ok(()));
    assert_eq!(replica.apply(3, write(chunk(1, 0), 1, 8, 8, 4), b"8888").await, Ok(()));
    assert_eq!(replica.apply(4, write(chunk(1, 0), 1, 7, 1, 4), b"late").await, dead);
    assert_eq!(replica.read(chunk(1, 0), 6), b"8888\0\0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_volume_stays_deleted() {
    let dir = tempfile::tempdir().expect("tempdir");
    let pool = pool(dir.path());
    let mut replica = Replica::open(dir.path(), &pool);
    assert_eq!(replica.apply(1, write(chunk(1, 0), 1, 1, 1, 3), b"one").await, Ok(()));
    assert_eq!(replica.apply(2, Command::DeleteVolume(VolumeId::new(1)), b"").await, Ok(()));
    assert_eq!(replica.apply(3, write(chunk(1, 0), 9, 1, 1, 3), b"two").await, Err(Fault::Fenced));
    assert!(!replica.shared.store.has(chunk(1, 0)));
    let (volume, epoch) = (VolumeId::new(2), Epoch::new(4));
    assert_eq!(replica.apply(4, Command::Fence { volume, epoch }, b"").await, Ok(()));
    assert_eq!(replica.apply(5, write(chunk(2, 0), 3, 1, 1, 3), b"old").await, Err(Fault::Fenced));
}

/// Sends the source's items to a sink of `to`, at most `limit` of them; returns how many were asked for.
async fn copy(from: &Replica, to: &mut Replica, limit: usize) -> usize {
    let (_, mut source) = from.machine.snapshot_source().expect("source");
    let mut sink = to.machine.snapshot_sink().expect("sink");
    let wanted = sink.begin(source.manifest()).await.expect("begins");
    for item in wanted.iter().take(limit) {
        let data = source.read(*item).await.expect("reads");
        assert!(data.len() <= 1 << 20);
        sink.write(*item, data).await.expect("writes");
    }
    if wanted.len() <= limit {
        sink.finish().await.expect("finishes");
    }
    wanted.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_copied_and_an_interrupted_copy_goes_on() {
    let dirs = [0; 2].map(|_| tempfile::tempdir().expect("tempdir"));
    let pools = [0, 1].map(|i| pool(dirs[i].path()));
    let mut from = Replica::open(dirs[0].path(), &pools[0]);
    for index in 0..3 {
        let command = write(chunk(1, index), 2, 10, 10, 5);
        assert_eq!(from.apply(u64::from(index), command, b"hello").await, Ok(()));
    }
    from.checkpoint(2).await;

    let mut to = Replica::open(dirs[1].path(), &pools[1]);
    assert_eq!(to.apply(0, write(chunk(1, 0), 2, 10, 10, 5), b"hello").await, Ok(()));
    assert_eq!(to.apply(1, write(chunk(7, 7), 1, 1, 1, 4), b"gone").await, Ok(()));
    assert_eq!(copy(&from, &mut to, 1).await, 2, "one chunk is there already");
    assert!(to.shared.store.has(chunk(7, 7)), "nothing living is touched before the end");
    assert_eq!(copy(&from, &mut to, 9).await, 1, "the interrupted copy goes on");
    let checkpoint = from.machine.checkpoint();
    to.machine.installed(checkpoint.clone()).await.expect("is installed");

    drop(to);
    let mut to = Replica::open(dirs[1].path(), &pools[1]);
    assert_eq!(to.machine.checkpoint(), checkpoint);
    for index in 0..3 {
        assert_eq!(to.read(chunk(1, index), 6), b"hello\0");
    }
    assert_eq!(to.shared.store.present(), from.shared.store.present());
    assert!(to.apply(3, write(chunk(1, 0), 2, 9, 1, 3), b"old").await.is_err(), "the fence came along");
    assert_eq!(copy(&from, &mut to, 9).await, 0, "equal replicas exchange nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn old_entries_that_are_applied_while_a_copy_arrives_do_not_spoil_it() {
    let dirs = [0; 2].map(|_| tempfile::tempdir().expect("tempdir"));
    let pools = [0, 1].map(|i| pool(dirs[i].path()));
    let mut from = Replica::open(dirs[0].path(), &pools[0]);
    let mut to = Replica::open(dirs[1].path(), &pools[1]);
    for (index, volume) in [(1, 1), (2, 1), (3, 2)] {
        let command = write(chunk(volume, index as u32), 2, index, 1, 5);
        assert_eq!(from.apply(index, command, b"hello").await, Ok(()));
        assert_eq!(to.apply(index, command, b"hello").await, Ok(()));
    }
    assert_eq!(from.apply(6, write(chunk(1, 0), 2, 6, 1, 5), b"extra").await, Ok(()));
    from.checkpoint(6).await;

    let (_, mut source) = from.machine.snapshot_source().expect("source");
    let mut sink = to.machine.snapshot_sink().expect("sink");
    let wanted = sink.begin(source.manifest()).await.expect("begins");
    assert_eq!(wanted.len(), 1, "three chunks are there already");
    // Entries that lay in the log here, and that what the sender has comes after.
    assert_eq!(to.apply(4, write(chunk(1, 1), 2, 4, 1, 5), b"older").await, Ok(()));
    assert_eq!(to.apply(5, Command::DeleteVolume(VolumeId::new(2)), b"").await, Ok(()));
    sink.write(wanted[0], source.read(wanted[0]).await.expect("reads")).await.expect("writes");
    sink.finish().await.expect("finishes");
    to.machine.installed(from.machine.checkpoint()).await.expect("is installed");

    for again in 0..2 {
        for id in [chunk(1, 1), chunk(1, 2), chunk(2, 3)] {
            assert_eq!(to.read(id, 6), b"hello\0", "{id} {again}");
        }
        assert_eq!(to.shared.store.present(), from.shared.store.present());
        drop(to);
        to = Replica::open(dirs[1].path(), &pools[1]);
    }
    assert_eq!(to.apply(7, write(chunk(1, 1), 2, 7, 1, 5), b"newer").await, Ok(()));
    assert_eq!(
        std::fs::read_dir(dirs[1].path().join("incoming")).expect("lists").count(),
        0,
        "nothing is left over"
    );
}

/// Two replicas in `dirs`, equal up to entry 2 in chunk 1 of volume 1 and different elsewhere; the first has a
/// checkpoint at entry 6.
async fn unequal(dirs: [&Path; 2]) -> [Replica; 2] {
    let [mut from, mut to] = dirs.map(|dir| Replica::open(dir, &pool(dir)));
    for replica in [&mut from, &mut to] {
        assert_eq!(replica.apply(1, write(chunk(1, 0), 2, 1, 1, 5), b"older").await, Ok(()));
        assert_eq!(replica.apply(2, write(chunk(1, 1), 2, 2, 1, 5), b"equal").await, Ok(()));
    }
    assert_eq!(from.apply(5, write(chunk(1, 0), 2, 5, 1, 5), b"newer").await, Ok(()));
    assert_eq!(from.apply(6, write(chunk(1, 2), 2, 6, 6, 5), b"added").await, Ok(()));
    from.checkpoint(6).await;
    assert_eq!(to.apply(3, write(chunk(7, 7), 1, 1, 1, 4), b"gone").await, Ok(()));
    [from, to]
}

fn equals(from: &Replica, to: &Replica) {
    assert_eq!(to.machine.checkpoint(), from.machine.checkpoint());
    assert_eq!(to.shared.store.present(), from.shared.store.present());
    for id in from.shared.store.present() {
        assert_eq!(to.read(id, 6), from.read(id, 6), "{id}");
    }
    assert_eq!(*to.shared.fence.read().unwrap(), *from.shared.fence.read().unwrap());
}

fn files(dir: &Path) -> usize {
    std::fs::read_dir(dir).expect("lists").count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_another_transfer_replaced_is_not_installed() {
    let dirs = [0; 2].map(|_| tempfile::tempdir().expect("tempdir"));
    let [from, mut to] = unequal([dirs[0].path(), dirs[1].path()]).await;
    to.checkpoint(3).await;
    assert_eq!(copy(&from, &mut to, 9).await, 2);
    let (before, present) = (to.machine.checkpoint(), to.shared.store.present());
    let (_, source) = from.machine.snapshot_source().expect("source");
    let mut next = to.machine.snapshot_sink().expect("sink");
    next.begin(source.manifest()).await.expect("begins");
    to.machine.installed(from.machine.checkpoint()).await.expect_err("it guards its chunks no more");
    drop(next);
    for _ in 0..2 {
        assert_eq!(to.shared.store.present(), present);
        assert_eq!(to.machine.checkpoint(), before);
        assert_eq!(to.read(chunk(1, 1), 5), b"equal");
        drop(to);
        to = Replica::open(dirs[1].path(), &pool(dirs[1].path()));
    }
}

/// Two replicas of which the second has received the first one's snapshot to the end, and how it is to adopt it.
async fn received(dirs: [&Path; 2]) -> (Replica, Replica, adoption::Adoption) {
    let [from, mut to] = unequal(dirs).await;
    assert_eq!(copy(&from, &mut to, 9).await, 2);
    let staged = to.machine.staged.lock().unwrap().take().expect("was received");
    let adoption = staged.prepare(&to.shared, from.machine.checkpoint()).expect("is complete");
    (from, to, adoption)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adoption_that_a_crash_interrupted_goes_on_at_the_start() {
    for taken in 0.. {
        let dirs = [0; 2].map(|_| tempfile::tempdir().expect("tempdir"));
        let dir = dirs[1].path();
        let (from, to, adoption) = received([dirs[0].path(), dir]).await;
        adoption.save(dir, COPYSET).expect("saves");
        let steps = adoption.steps(dir, &to.shared.store).expect("nothing is missing");
        assert_eq!(steps.len(), 7, "two go, two come, three end it: {steps:?}");
        for step in steps.iter().take(taken) {
            adoption.take(*step, COPYSET, dir, &to.shared.store).expect("succeeds");
        }
        drop(to);
        for _ in 0..2 {
            let to = Replica::open(dir, &pool(dir));
            equals(&from, &to);
            assert!(!dir.join(adoption::FILE_NAME).exists(), "taken={taken}");
            assert_eq!(files(&dir.join("incoming")), 0, "taken={taken}");
        }
        if taken == steps.len() {
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adoption_without_one_of_its_chunks_is_refused_whole() {
    let dirs = [0; 2].map(|_| tempfile::tempdir().expect("tempdir"));
    let dir = dirs[1].path();
    let (_, to, adoption) = received([dirs[0].path(), dir]).await;
    let lost = crate::store::chunk_store::file_name(chunk(1, 2));
    std::fs::remove_file(dir.join("incoming").join(lost)).expect("is there");
    let present = to.shared.store.present();
    adoption.carry_out(COPYSET, dir, &to.shared.store).expect_err("a chunk is nowhere");
    assert_eq!(to.shared.store.present(), present);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_that_ends_after_a_snapshot_came_does_not_go_back_behind_it() {
    let dirs = [0; 2].map(|_| tempfile::tempdir().expect("tempdir"));
    let [from, mut to] = unequal([dirs[0].path(), dirs[1].path()]).await;
    let job = to.machine.begin_checkpoint();
    assert_eq!(copy(&from, &mut to, 9).await, 2);
    to.machine.installed(from.machine.checkpoint()).await.expect("is installed");
    let old = Checkpoint { position: Some(at(3)), membership: Bytes::from_static(b"old") };
    job.run(old).await.expect("ends");
    for _ in 0..2 {
        equals(&from, &to);
        drop(to);
        to = Replica::open(dirs[1].path(), &pool(dirs[1].path()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_that_the_log_has_overtaken_lets_go_of_its_chunks() {
    let dirs = [0; 2].map(|_| tempfile::tempdir().expect("tempdir"));
    let [from, mut to] = unequal([dirs[0].path(), dirs[1].path()]).await;
    let incoming = dirs[1].path().join("incoming");
    assert_eq!(to.apply(4, write(chunk(1, 2), 2, 6, 6, 5), b"added").await, Ok(()));
    let (_, source) = from.machine.snapshot_source().expect("source");
    let mut sink = to.machine.snapshot_sink().expect("sink");
    assert_eq!(sink.begin(source.manifest()).await.expect("begins").len(), 1, "two are there already");
    let before = files(&incoming);
    assert_eq!(to.apply(6, write(chunk(1, 1), 2, 7, 6, 5), b"67890").await, Ok(()));
    assert_eq!(files(&incoming), before + 1, "the snapshot may still come");
    assert_eq!(to.apply(7, write(chunk(1, 2), 2, 8, 6, 5), b"78901").await, Ok(()));
    assert_eq!(files(&incoming), before + 1, "it is of no use any more");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_makes_apply_wait_and_not_differ() {
    let dir = tempfile::tempdir().expect("tempdir");
    let pool = Pool::open(&dir.path().join("pool"), 1, crate::store::layout::FILE_BYTES, 0).expect("pool");
    let mut replica = Replica::open(dir.path(), &pool);
    assert_eq!(replica.apply(1, write(chunk(1, 0), 1, 1, 1, 3), b"one").await, Ok(()));
    let shared = Arc::clone(&replica.shared);
    let freed = async {
        while !shared.store.disk().pool.full() {
            tokio::task::yield_now().await;
        }
        shared.store.remove(chunk(1, 0)).expect("gives back");
    };
    let (applied, ()) = tokio::join!(replica.apply(2, write(chunk(1, 1), 1, 2, 1, 3), b"two"), freed);
    assert_eq!(applied, Ok(()));
    assert_eq!(replica.read(chunk(1, 1), 3), b"two");
}
