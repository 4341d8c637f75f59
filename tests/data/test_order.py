"""The order of samples: properties over random shapes of data sets, batches, ranks and stop points."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmscale.data.order import Order, epoch_order, flips, parts

orders = st.builds(
    Order,
    shard_sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8).map(tuple),
    num_canonical_nodes=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    shuffle_block=st.integers(1, 60),
)


@given(order=orders, epoch=st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_every_sample_comes_once_an_epoch(order: Order, epoch: int) -> None:
    assert sorted(epoch_order(order, epoch)) == list(range(order.num_samples))


@given(order=orders, epoch=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_position_p_belongs_to_canonical_node_p_mod_c_and_to_its_part(order: Order, epoch: int) -> None:
    bounds = parts(order.num_samples, order.num_canonical_nodes)
    sizes = [end - start for start, end in bounds]
    assert sum(sizes) == order.num_samples
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
    for position, sample in enumerate(epoch_order(order, epoch)):
        start, end = bounds[position % order.num_canonical_nodes]
        assert start <= sample < end


@given(
    order=orders,
    start=st.integers(0, 500),
    share=st.integers(1, 12),
    num_ranks=st.sampled_from([1, 2, 3, 4, 8]),
)
@settings(max_examples=200, deadline=None)
def test_ranks_share_the_global_batch_without_loss_or_double(order: Order, start: int, share: int, num_ranks: int):
    size = share * num_ranks
    pieces = [
        order.rank_positions(start, global_batch_size=size, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)
    ]
    assert all(len(piece) == share for piece in pieces)
    assert sorted(np.concatenate(pieces)) == list(range(start, start + size))


@given(order=orders, epochs=st.integers(1, 3), cut=st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_the_sequence_is_the_epochs_one_after_the_other_from_any_start(order: Order, epochs: int, cut: int) -> None:
    whole = np.concatenate([epoch_order(order, epoch) for epoch in range(epochs)])
    ids, of_epoch, nodes = order.at(np.arange(len(whole)))
    np.testing.assert_array_equal(ids, whole)
    within = np.tile(np.arange(order.num_samples), epochs)
    np.testing.assert_array_equal(nodes, within % order.num_canonical_nodes)
    np.testing.assert_array_equal(of_epoch, np.repeat(np.arange(epochs), order.num_samples))
    later, _, _ = order.at(np.arange(min(cut, len(whole) - 1), len(whole)))
    np.testing.assert_array_equal(later, whole[min(cut, len(whole) - 1) :])


@given(
    order=orders,
    start=st.integers(0, 300),
    legs=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=5
    ),
)
@settings(max_examples=400, deadline=None)
@pytest.mark.long
def test_a_run_that_stops_and_moves_anywhere_sees_what_a_straight_one_sees(order: Order, start: int, legs):
    """Legs of (ranks, samples per rank, steps): every position once, in its place among the steps, with its sample."""
    cursor = start
    for num_ranks, share, steps in legs:
        size = num_ranks * share
        for _ in range(steps):
            ranks = [
                order.rank_positions(cursor, global_batch_size=size, rank=rank, num_ranks=num_ranks)
                for rank in range(num_ranks)
            ]
            assert sorted(np.concatenate(ranks)) == list(range(cursor, cursor + size))
            ids = dict(zip(np.concatenate(ranks), np.concatenate([order.at(one)[0] for one in ranks]), strict=True))
            for position, sample in ids.items():
                epoch, within = divmod(int(position), order.num_samples)
                assert sample == epoch_order(order, epoch)[within]
            cursor += size


def test_a_node_of_a_cluster_touches_its_own_parts_only() -> None:
    order = Order((100,) * 16, num_canonical_nodes=8, seed=1, shuffle_block=64)
    for num_nodes, ranks_per_node in ((2, 1), (2, 4), (4, 2), (8, 1)):
        num_ranks = num_nodes * ranks_per_node
        for rank in range(num_ranks):
            node = rank // ranks_per_node
            for cursor in range(0, 1600, 160):
                positions = order.rank_positions(cursor, global_batch_size=160, rank=rank, num_ranks=num_ranks)
                ids, _, _ = order.at(positions)
                assert set(ids // (1600 // num_nodes)) == {node}


def test_few_shards_are_in_use_at_a_time() -> None:
    order = Order((50,) * 40, num_canonical_nodes=1, seed=5, shuffle_block=100)
    shards = epoch_order(order, 0) // 50
    assert max(len(set(shards[at : at + 100])) for at in range(0, 2000, 100)) <= 3
    assert len(set(shards[:1000])) <= 21


def test_seed_and_epoch_change_the_order_and_nothing_else_does() -> None:
    order = Order((100, 100), num_canonical_nodes=2, seed=1, shuffle_block=1000)
    other = Order((100, 100), num_canonical_nodes=2, seed=2, shuffle_block=1000)
    assert (epoch_order(order, 0) != epoch_order(order, 1)).mean() > 0.9
    assert (epoch_order(order, 0) != epoch_order(other, 0)).mean() > 0.9
    again = epoch_order.__wrapped__(order, 0)
    np.testing.assert_array_equal(again, epoch_order(order, 0))


def test_the_order_is_the_one_that_old_runs_had() -> None:
    order = Order((5, 4, 3), num_canonical_nodes=2, seed=7, shuffle_block=4)
    assert epoch_order(order, 0).tolist() == [0, 9, 5, 8, 2, 6, 1, 7, 3, 11, 4, 10]
    assert "".join(str(int(flip)) for flip in flips(order, tuple("abcdefghijkl"), np.zeros(12))) == "110011010011"


def test_flips_are_a_fair_coin_of_key_epoch_and_seed() -> None:
    order = Order((4000,), num_canonical_nodes=1, seed=1, shuffle_block=1)
    keys = tuple(map(str, range(4000)))
    first = np.array(flips(order, keys, np.zeros(4000)))
    second = np.array(flips(order, keys, np.ones(4000)))
    assert abs(first.mean() - 0.5) < 0.04  # five standard deviations
    assert abs((first == second).mean() - 0.5) < 0.04
    assert flips(order, keys[7:8], np.zeros(1)) == [first[7]]
