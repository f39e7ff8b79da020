"""Position ids with gaps: short samples that hold the relative distances of long ones.

A strategy says before which tokens of a sample the positions skip, and by how much; everything between two skips keeps
contiguous positions. Only NumPy.
"""

import hashlib
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_longalign.blocks import as_lengths


class Skips(NamedTuple):
    """Where positions skip: before token `tokens[k]` they leave out `sizes[k]`; int64 `(skips,)`, ascending tokens."""

    tokens: np.ndarray
    sizes: np.ndarray


NO_SKIPS = Skips(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

Sampler = Callable[[np.ndarray, np.ndarray, int, np.random.Generator], Skips]
Strategy = str | Callable[[np.ndarray, int, np.random.Generator], ArrayLike]


def sample_positions(
    block_lengths: ArrayLike,
    *,
    strategy: Strategy,
    target_length: int,
    rng: np.random.Generator,
    response: ArrayLike | None = None,
) -> np.ndarray:
    """Draw the position ids of one sample.

    Args:
        block_lengths: int `(blocks,)` tokens of each block, in order. Blocks may be finer than turns: a context, a
            question.
        strategy: a name of `STRATEGIES`, or `strategy(block_lengths, target_length, rng) -> positions`, whose result
            is checked.
        target_length: positions stay below it; at least the length of the sample.
        rng: source of all randomness, see [`document_rng`].
        response: bool `(blocks,)`, which blocks are responses. By default SkipAlign's sample: instruction, response,
            instruction, response. A turn ends with a response that an instruction follows.

    Returns:
        int64 `(sum(block_lengths),)`, strictly increasing from 0, below `target_length`.

    Raises:
        ValueError: an argument that is not as said above, or positions of a callable that are not.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> sample_positions([3, 2], strategy="none", target_length=16, rng=rng)
    array([0, 1, 2, 3, 4])
    >>> sample_positions([3, 2], strategy="skip_inner", target_length=16, rng=rng)
    array([ 0,  1,  2, 13, 14])
    """
    sampler = get_strategy(strategy)
    lengths = as_lengths("block_lengths", block_lengths)
    flags = np.arange(lengths.size) % 2 == 1 if response is None else np.asarray(response)
    if flags.dtype.kind != "b" or flags.shape != lengths.shape:
        raise ValueError(
            f"`response` must be one bool per block, {lengths.size} here, got {response!r}. Set one per block."
        )
    length = int(lengths.sum())
    check_target_length(target_length, length)
    skips = sampler(lengths, flags, target_length, rng)
    steps = np.ones(length, dtype=np.int64)
    steps[0] = 0
    steps[skips.tokens] += skips.sizes
    return np.cumsum(steps)


def get_strategy(strategy: Strategy) -> Sampler:
    """Return the sampler of a strategy, `sampler(block_lengths, response, target_length, rng) -> Skips`.

    Raises:
        ValueError: an unknown strategy; the message lists those there are.
    """
    if not callable(strategy):
        if strategy not in STRATEGIES:
            raise ValueError(
                f"`strategy` must be one of {list(STRATEGIES)} or a callable, got {strategy!r}. Set one of them."
            )
        return STRATEGIES[strategy]

    def checked(lengths: np.ndarray, response: np.ndarray, target_length: int, rng: np.random.Generator) -> Skips:
        length = int(lengths.sum())
        array = np.asarray(strategy(lengths, target_length, rng))
        problem = None
        if array.dtype.kind not in "iu" or array.shape != (length,):
            problem = f"{array.dtype} of shape {array.shape}"
        else:
            array = array.astype(np.int64)  # differences of unsigned numbers would wrap around
            if array[0] != 0 or array[-1] >= target_length or (np.diff(array) < 1).any():
                problem = f"{array!r}"
        if problem is not None:
            raise ValueError(
                f"`strategy` must return {length} whole numbers that increase strictly from 0 and stay below "
                f"`target_length`, {target_length}, got {problem}. Correct the callable."
            )
        return Skips(np.arange(1, length), np.diff(array) - 1)

    return checked


def check_target_length(target_length: Any, length: int = 1, name: str = "target_length") -> None:
    """Raise a ValueError unless a target length is a whole number of at least `length` tokens."""
    if isinstance(target_length, bool) or not isinstance(target_length, (int, np.integer)):
        raise ValueError(f"`{name}` must be a whole number, got {target_length!r}. Set it to the length you need.")
    if target_length < length:
        raise ValueError(
            f"`{name}` must be at least the length of the sample, {length} tokens, got {target_length}. "
            "Set a larger target length or truncate the samples."
        )


def check_share(name: str, share: Any) -> None:
    """Raise a ValueError unless a share is a number from 0 to 1."""
    if isinstance(share, bool) or not isinstance(share, (int, float, np.number)) or not 0 <= share <= 1:
        raise ValueError(f"`{name}` must be a number from 0 to 1, got {share!r}. Set the share of the samples.")


def no_skips(lengths: np.ndarray, response: np.ndarray, target_length: int, rng: np.random.Generator) -> Skips:
    """Keep ordinary positions 0, 1, 2 …: the baseline."""
    return NO_SKIPS


def skip_inner(lengths: np.ndarray, response: np.ndarray, target_length: int, rng: np.random.Generator) -> Skips:
    """SkipAlign's Skip-Inner: skip inside the turns, between an instruction and its response.

    The paper's (https://arxiv.org/abs/2405.03939): blocks keep contiguous positions and are shifted by a bias that
    grows at these boundaries. Ours: boundaries between the finer blocks of a turn count as inside it, and the sizes
    are drawn as [`skips_at`] says; the paper's way to draw them is not public.
    """
    return skips_at(lengths, ~_turn_ends(response), target_length, rng)


def skip_outer(lengths: np.ndarray, response: np.ndarray, target_length: int, rng: np.random.Generator) -> Skips:
    """SkipAlign's Skip-Outer: skip between turns. A sample of one turn keeps ordinary positions.

    The paper's (https://arxiv.org/abs/2405.03939): the boundaries. Ours: the sizes, see [`skips_at`].
    """
    return skips_at(lengths, _turn_ends(response), target_length, rng)


def skip_all(lengths: np.ndarray, response: np.ndarray, target_length: int, rng: np.random.Generator) -> Skips:
    """SkipAlign's Skip-All: skip at every block boundary.

    The paper's (https://arxiv.org/abs/2405.03939): the boundaries. Ours: the sizes, see [`skips_at`].
    """
    return skips_at(lengths, np.ones(lengths.size - 1, dtype=bool), target_length, rng)


def skip_context(lengths: np.ndarray, response: np.ndarray, target_length: int, rng: np.random.Generator) -> Skips:
    """Skip before every block but a response: between contexts, before the question, between turns.

    Ours, and the default. SkipAlign's skip between an instruction and its response makes a model go on with nothing
    near, which no long text does; here a response stays right behind what it answers. A sample without another
    boundary is cut at a random token of its first block, and keeps ordinary positions where that is a single token.
    For the sizes see [`skips_at`].
    """
    allowed = ~response[1:]
    if not allowed.any():
        if lengths[0] < 2:
            return NO_SKIPS
        cut = int(rng.integers(1, lengths[0]))
        lengths, allowed = np.array([cut, lengths.sum() - cut]), np.array([True])
    return skips_at(lengths, allowed, target_length, rng)


def _turn_ends(response: np.ndarray) -> np.ndarray:
    """Bool `(blocks - 1,)`: the boundaries where a response is followed by an instruction."""
    return response[:-1] & ~response[1:]


def skips_at(lengths: np.ndarray, allowed: np.ndarray, target_length: int, rng: np.random.Generator) -> Skips:
    """Draw skips at the allowed ones of the boundaries between blocks; without any, none.

    Our choice: the span, largest position + 1, is drawn uniformly from {n, …, target_length} for n tokens, and what it
    has over n is split over the boundaries by a uniform random composition. So the distance between the first and the
    last block is uniform; drawing one skip after the other from what is left would favour the first.

    Args:
        lengths: int64 `(blocks,)`.
        allowed: bool `(blocks - 1,)`.
        target_length: largest span.
        rng: source of randomness.
    """
    ends = lengths.cumsum()
    tokens = ends[:-1][allowed]
    if not tokens.size:
        return NO_SKIPS
    spare = int(rng.integers(0, target_length - int(ends[-1]), endpoint=True))
    return Skips(tokens, composition(spare, tokens.size, rng))


def composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Split `total` into `parts` numbers of at least 0, every ordered way being as likely as any other.

    Stars and bars: the places of the bars among `total + parts - 1` are a uniform subset.

    >>> composition(10, 3, np.random.default_rng(0))
    array([7, 1, 2])
    """
    edges = np.empty(parts + 1, dtype=np.int64)
    edges[0], edges[-1] = -1, total + parts - 1
    if parts > 1:
        edges[1:-1] = rng.choice(total + parts - 1, parts - 1, replace=False, shuffle=False)
        edges.sort()
    return edges[1:] - edges[:-1] - 1


def pose(lengths: np.ndarray, response: np.ndarray, target_length: int, rng: np.random.Generator) -> Skips:
    """PoSE: one skip at a random token, blind to blocks. A single token keeps its position.

    The paper's (https://arxiv.org/abs/2309.10400): two chunks, the first stays, the second is shifted by
    u ~ U{0, …, target_length - n}. Ours: the split is uniform over the whole sample (the authors' script draws it from
    the first half), and the two chunks are neighbours in the text: nothing of a sample is left out.
    """
    length = int(lengths.sum())
    if length < 2:
        return NO_SKIPS
    split = rng.integers(1, length)
    return Skips(np.array([split]), np.array([rng.integers(0, target_length - length, endpoint=True)]))


def randpos(lengths: np.ndarray, response: np.ndarray, target_length: int, rng: np.random.Generator) -> Skips:
    """RandPos: n sorted distinct positions out of `target_length`, blind to blocks.

    The paper's (Ruoss et al. 2023, https://arxiv.org/abs/2305.16843): a uniform subset. Ours: it is shifted to start
    at 0, which no relative distance notices.
    """
    length = int(lengths.sum())
    positions = np.sort(rng.choice(target_length, length, replace=False, shuffle=False))
    return Skips(np.arange(1, length), np.diff(positions) - 1)


def cream(lengths: np.ndarray, response: np.ndarray, target_length: int, rng: np.random.Generator) -> Skips:
    """CREAM: head and tail at the two ends, the middle at a place drawn from a truncated Gaussian, blind to blocks.

    The paper's (https://arxiv.org/abs/2406.07138): three segments; head and tail take a third of the sample each or,
    by a fair coin, a few tokens (4 per factor of extension); the tail ends at `target_length - 1`; the middle segment
    favours the middle. Ours: the Gaussian is drawn for the shift of the middle segment itself, with mean half of the
    range and deviation 3/14 of it, the authors' for 8-fold extension. Fewer than 3 tokens keep ordinary positions.
    """
    length = int(lengths.sum())
    if length < 3:
        return NO_SKIPS
    end = length // 3
    if rng.integers(2):
        end = min(end, 4 * (target_length // length))
    spare = target_length - length
    shift = -1
    while not 0 <= shift <= spare:
        shift = round(spare / 2 + spare * 3 / 14 * rng.standard_normal())
    return Skips(np.array([end, length - end]), np.array([shift, spare - shift]))


STRATEGIES: dict[str, Sampler] = {
    "none": no_skips,
    "skip_inner": skip_inner,
    "skip_outer": skip_outer,
    "skip_all": skip_all,
    "skip_context": skip_context,
    "pose": pose,
    "randpos": randpos,
    "cream": cream,
}
# SkipAlign's, and ours after them, which cuts the first block where there is no other place.
BOUNDARY_STRATEGIES = ("skip_inner", "skip_outer", "skip_all", "skip_context")


class _Digest(np.random.bit_generator.ISeedSequence):
    """A hash as the seed of a bit generator: it is random already and takes 1 µs where a SeedSequence takes 6."""

    def __init__(self, digest: bytes) -> None:
        self.words = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> np.ndarray:
        return self.words[:n_words]


def document_rng(input_ids: np.ndarray, *, seed: int, epoch: int) -> np.random.Generator:
    """Make the random generator of a document: a function of seed, epoch and content alone.

    So its positions are the same in any process, batch and order, and on any platform, and new every epoch. The ids
    are hashed by BLAKE2b as little-endian int64; 256 bits of it are the state of a PCG64.

    Args:
        input_ids: int `(n,)`.
        seed: any 64-bit integer.
        epoch: any 64-bit integer.

    Example:

    >>> rng = document_rng(np.array([1, 2, 3]), seed=0, epoch=0)
    >>> int(rng.integers(1000)) == int(document_rng(np.array([1, 2, 3]), seed=0, epoch=0).integers(1000))
    True
    """
    digest = hashlib.blake2b(struct.pack("<qq", seed, epoch), digest_size=32)
    digest.update(np.ascontiguousarray(input_ids, dtype="<i8").data)
    seed_sequence: Any = _Digest(digest.digest())
    return np.random.Generator(np.random.PCG64(seed_sequence))
