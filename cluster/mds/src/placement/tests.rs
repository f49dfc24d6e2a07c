//! Properties of placement: distinct zones, balance, bounded scatter width.

use super::*;
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

fn sites(per_zone: &[usize]) -> Vec<Site> {
    let zones = per_zone.iter().enumerate().flat_map(|(zone, count)| vec![format!("z{zone}"); *count]);
    (1..).zip(zones).map(|(id, zone)| Site { id: ChunkserverId::new(id), zone }).collect()
}

fn plan(
    sites: &[Site],
    copysets: usize,
    replicas: usize,
    scatter_width: usize,
    seed: u64,
) -> Vec<Vec<ChunkserverId>> {
    let shape = Shape { copysets, replicas, scatter_width };
    plan_copysets(sites, shape, &mut StdRng::seed_from_u64(seed)).expect("enough zones")
}

fn widths(copysets: &[Vec<ChunkserverId>]) -> BTreeMap<ChunkserverId, usize> {
    let mut partners: BTreeMap<ChunkserverId, BTreeSet<ChunkserverId>> = BTreeMap::new();
    for members in copysets {
        for member in members {
            partners.entry(*member).or_default().extend(members.iter().filter(|other| *other != member));
        }
    }
    partners.into_iter().map(|(id, partners)| (id, partners.len())).collect()
}

fn spread(counts: impl IntoIterator<Item = usize> + Clone) -> usize {
    let low = counts.clone().into_iter().min().unwrap_or(0);
    counts.into_iter().max().unwrap_or(0) - low
}

#[test]
fn three_chunkservers_share_everything_and_lead_evenly() {
    let sites = sites(&[1, 1, 1]);
    let copysets = plan(&sites, 100, 3, 12, 1);
    assert_eq!(copysets.len(), 100);
    assert!(count_replicas(copysets.iter().map(Vec::as_slice)).values().all(|count| *count == 100));
    let firsts = count_replicas(copysets.iter().map(|members| &members[..1]));
    assert_eq!(firsts.values().sum::<usize>(), 100);
    assert_eq!(spread(firsts.values().copied()), 1, "{firsts:?}");
}

#[test]
fn fewer_zones_than_replicas_is_refused() {
    let shape = Shape { copysets: 1, replicas: 3, scatter_width: 12 };
    assert_eq!(plan_copysets(&sites(&[4, 4]), shape, &mut StdRng::seed_from_u64(1)), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn members_lie_in_distinct_zones(
        per_zone in proptest::collection::vec(1usize..5, 3..6), width in 2usize..20, seed: u64,
    ) {
        let sites = sites(&per_zone);
        let zone_of: BTreeMap<_, _> = sites.iter().map(|site| (site.id, site.zone.as_str())).collect();
        for members in plan(&sites, 60, 3, width, seed) {
            let zones: BTreeSet<_> = members.iter().map(|member| zone_of[member]).collect();
            prop_assert_eq!(zones.len(), 3);
        }
    }

    #[test]
    fn load_is_even_and_scatter_width_bounded(zones in 3usize..6, each in 1usize..5, width in 6usize..14, seed: u64) {
        let sites = sites(&vec![each; zones]);
        let copysets = plan(&sites, 40 * sites.len(), 3, width, seed);
        let counts = count_replicas(copysets.iter().map(Vec::as_slice));
        prop_assert_eq!(counts.len(), sites.len());
        // 120 replicas on each, were it perfect.
        prop_assert!(counts.values().all(|count| (90..=150).contains(count)), "{:?}", counts);
        let firsts = count_replicas(copysets.iter().map(|members| &members[..1]));
        prop_assert!(spread(firsts.values().copied()) <= 4, "{:?}", firsts);
        let widest = widths(&copysets).into_values().max().unwrap_or(0);
        // A chunkserver that would otherwise hold nothing may bring two partners past the bound.
        prop_assert!(widest <= width + 2, "widest={} width={}", widest, width);
    }

    #[test]
    fn no_copyset_gets_more_than_its_share_of_a_segment(
        filled in proptest::collection::vec((1u64..1 << 40, 0u64..100_000, 0u32..5), 1..40), seed: u64,
    ) {
        let slots: Vec<Slot> = (1..).zip(&filled)
            .map(|(id, (weight, chunks, leader))| Slot {
                copyset: CopysetId::new(id),
                leader: leader.checked_sub(1).map(ChunkserverId::new),
                weight: *weight,
                chunks: *chunks,
            })
            .collect();
        let placed = place_chunks(&slots, 64, &mut StdRng::seed_from_u64(seed)).expect("there are slots");
        prop_assert_eq!(placed.len(), 64);
        let mut counts: BTreeMap<CopysetId, usize> = BTreeMap::new();
        placed.iter().for_each(|copyset| *counts.entry(*copyset).or_default() += 1);
        prop_assert_eq!(counts.len(), slots.len().min(SEGMENT_COPYSETS));
        let most = 64usize.div_ceil(counts.len());
        prop_assert!(counts.values().all(|count| (most - 1..=most).contains(count)), "{:?}", counts);
        prop_assert!(counts.len() == 1 || placed.windows(2).all(|pair| pair[0] != pair[1]));
    }

    #[test]
    fn chunks_fill_copysets_in_proportion_to_weight(weights in proptest::collection::vec(1u64..20, 3..40), seed: u64) {
        // More than a third is not to be had.
        prop_assume!(weights.iter().all(|weight| 3 * weight <= weights.iter().sum()));
        let mut random = StdRng::seed_from_u64(seed);
        let mut slots: Vec<Slot> = (1..).zip(&weights)
            .map(|(id, weight)| Slot { copyset: CopysetId::new(id), leader: None, weight: *weight, chunks: 0 })
            .collect();
        for _ in 0..100 {
            for copyset in place_chunks(&slots, 64, &mut random).expect("there are slots") {
                slots[copyset.get() as usize - 1].chunks += 1;
            }
        }
        let total: u64 = weights.iter().sum();
        for slot in &slots {
            let fair = 100.0 * 64.0 * slot.weight as f64 / total as f64;
            prop_assert!((slot.chunks as f64 - fair).abs() <= fair * 0.1 + 44.0, "{:?} fair={}", slot, fair);
        }
    }
}

#[test]
fn a_segment_lies_in_few_copysets_with_different_leaders() {
    let slot = |id, chunks| Slot {
        copyset: CopysetId::new(id),
        leader: Some(ChunkserverId::new(id % 3 + 1)),
        weight: 5,
        chunks,
    };
    let mut random = StdRng::seed_from_u64(3);
    let slots: Vec<Slot> = (1..=99).map(|id| slot(id, u64::from(id % 7))).collect();
    for _ in 0..50 {
        let placed = place_chunks(&slots, 64, &mut random).expect("there are slots");
        let copysets: BTreeSet<_> = placed.iter().collect();
        assert_eq!(copysets.len(), SEGMENT_COPYSETS);
        let leaders: BTreeSet<_> = copysets.iter().map(|id| id.get() % 3).collect();
        assert_eq!(leaders.len(), 3, "{copysets:?}");
    }
    // One leader's copysets are far fuller than the others': its leader alone does not bring it chunks.
    let slots: Vec<Slot> = (1..=99).map(|id| slot(id, if id % 3 == 0 { 500 } else { 0 })).collect();
    let placed = place_chunks(&slots, 64, &mut random).expect("there are slots");
    assert!(placed.iter().all(|id| id.get() % 3 != 0), "{placed:?}");
    assert_eq!(place_chunks(&[], 64, &mut random), None);
}
