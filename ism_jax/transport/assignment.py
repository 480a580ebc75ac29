"""Assigns rows to columns by an auction, nearly maximising the total value."""

import jax
import jax.numpy as jnp

# A bid exceeds the second best offer by this much. It bounds the distance of the total
# from the optimum, per row, in the units of the values.
INCREMENT = 0.02
# Rows that bid in a round. Fewer need more rounds; more waste bids on the same column.
BIDDERS = 8
# Bound on the rounds; rows then left without a column are paired in order. Without it
# the auction would end slowly if many rows are equal (hundreds of identical images).
ROUNDS_PER_ROW = 16


def argmax(x: jax.Array, axis: int) -> jax.Array:
    """Index of the first maximum, int32; on XLA's CPU backend faster than `jnp.argmax`.

    XLA vectorises these two reductions, but not the one in `jnp.argmax`.
    """
    size = x.shape[axis]
    number = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    is_max = x == x.max(axis, keepdims=True)
    return jnp.where(is_max, number, size - 1).min(axis)


def auction(
    value: jax.Array, price: jax.Array, favourite: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Assigns a different column to every row.

    Each row first gets its favourite column, unless an earlier row has the same one. A
    row without a column bids for the column with the largest value minus price. Its bid
    raises the price until the second best column would be as good, plus `INCREMENT`.
    The highest bidder gets the column at that price, and the former owner bids next.

    From any initial prices the total value is within `INCREMENT` per row of the optimum
    (Bertsekas, "Auction algorithms for network flow problems: a tutorial introduction",
    1992). From Sinkhorn's prices, few bids are needed.

    `BIDDERS` rows bid in a round while the others wait, so that a round reads few rows
    of the matrix.

    Args:
      value: [n, n], value of each column for each row.
      price: [n] initial prices of the columns.
      favourite: [n] int32, the argmax of value - price for each row.

    Returns:
      Column of each row [n] int32, final prices [n] and the number of rounds.
    """
    size = value.shape[0]
    bidders = min(BIDDERS, size)
    nobody = jnp.int32(size)
    number = jnp.arange(size, dtype=jnp.int32)

    owner = jnp.full(size, nobody).at[favourite].min(number)
    unassigned = owner[favourite] != number
    queue = jnp.nonzero(unassigned, size=size, fill_value=size)[0].astype(jnp.int32)

    def continues(carry):
        _, _, rows, _, rounds = carry
        return (rows < nobody).any() & (rounds < ROUNDS_PER_ROW * size)

    def play(carry):
        price, owner, rows, served, rounds = carry
        price, owner, rows = _bid(value, price, owner, rows)
        # Idle bidders are replaced by the next rows of the queue.
        idle = rows == nobody
        before = jnp.sum(_earlier(bidders) & idle[None], axis=1).astype(jnp.int32)
        rows = jnp.where(idle, _row_at(queue, served + before), rows)
        served = jnp.minimum(served + idle.sum().astype(jnp.int32), nobody)
        return price, owner, rows, served, rounds + 1

    rows = _row_at(queue, number[:bidders])
    carry = price, owner, rows, jnp.int32(bidders), jnp.int32(0)
    price, owner, _, _, rounds = jax.lax.while_loop(continues, play, carry)
    column = jnp.full(size, nobody).at[owner].set(number, mode='drop')
    # If the rounds ran out, the remaining rows and columns are paired in order.
    rows = jnp.nonzero(column == nobody, size=size, fill_value=size)[0]
    columns = jnp.nonzero(owner == nobody, size=size, fill_value=size)[0]
    column = column.at[rows].set(columns.astype(jnp.int32), mode='drop')
    return column, price, rounds


def _bid(value, price, owner, rows):
    """One round: new prices and owners, and the rows without a column [bidders].

    Row n stands for no row, as owner and as bidder.
    """
    size = value.shape[0]
    nobody = jnp.int32(size)
    number = jnp.arange(size, dtype=jnp.int32)
    profit = value.at[rows].get(mode='clip') - price[None]
    best = profit.max(1)
    wanted = argmax(profit, axis=1)
    second = jnp.where(number[None] == wanted[:, None], -jnp.inf, profit).max(1)
    second = jnp.where(jnp.isfinite(second), second, best)
    bid = price[wanted] + (best - second) + INCREMENT

    bids = rows < nobody
    rival = (wanted[:, None] == wanted[None]) & bids[None]
    higher = bid[None] > bid[:, None]
    equal = (bid[None] == bid[:, None]) & _earlier(len(rows))
    wins = bids & ~(rival & (higher | equal)).any(1)

    outbid = owner[wanted]
    sold = jnp.where(wins, wanted, nobody)
    price = price.at[sold].set(bid, mode='drop')
    owner = owner.at[sold].set(rows, mode='drop')
    return price, owner, jnp.where(wins, outbid, rows)


def _earlier(count: int) -> jax.Array:
    """[i, j]: whether j < i."""
    return jnp.tri(count, k=-1, dtype=bool)


def _row_at(queue, position):
    """Rows at these positions of the queue; n (no row) past its end."""
    return queue.at[position].get(mode='fill', fill_value=queue.shape[0])
