"""Random numbers inside compiled kernels: hashes of a stream and of a place in memory.

They do not depend on the number of threads, nor on what was drawn before.
"""

from __future__ import annotations

import numpy as np

from bids_varaug.machine import compiled
from bids_varaug.numerics.bits import like, size_of

BYTES_SD = 147.8011276006757  # of the sum of four uniform bytes; its mean is 510


@compiled()
def line_key(stream, line):
    """64 random bits for one line of memory: a step of SplitMix64 (Steele et al. 2014)."""
    word = stream + np.uint64(line + 1) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@compiled()
def random_word(place, first, second):
    """32 random bits: a hash of an element's place in its line and the line's two keys.

    Two rounds of xorshift-multiply (constants by Ettinger's search, `lowbias32`), the second key
    between them. Every step is cast to 32 bits, else numba computes with 64 and the loop is four
    times as slow.
    """
    word = np.uint32(np.uint32(place) + np.uint32(first))
    word = np.uint32(word ^ np.uint32(word >> np.uint32(16)))
    word = np.uint32(np.uint32(word * np.uint32(0x21F0AAAD)) + np.uint32(second))
    word = np.uint32(word ^ np.uint32(word >> np.uint32(15)))
    word = np.uint32(word * np.uint32(0xD35A2D97))
    return np.uint32(word ^ np.uint32(word >> np.uint32(15)))


@compiled()
def remixed(word, key):
    """A second word from the first."""
    word = np.uint32(np.uint32(word ^ key) * np.uint32(0x9E3779B1))
    return np.uint32(word ^ np.uint32(word >> np.uint32(15)))


@compiled()
def centred(word, template):
    """A number of mean 0 and standard deviation `BYTES_SD`, in the template's type."""
    mask = np.uint32(0x00FF00FF)
    odd = np.uint32(np.uint32(word >> np.uint32(8)) & mask)
    pairs = np.uint32(np.uint32(word & mask) + odd)
    total = np.uint32(np.uint32(pairs & np.uint32(0xFFFF)) + np.uint32(pairs >> np.uint32(16)))
    return like(np.int32(np.int32(total) - np.int32(510)), template)


@compiled()
def standard(word, template):
    """Draw g of mean 0 and variance 1 from 32 random bits, in the template's type."""
    return centred(word, template) * like(1 / BYTES_SD, template)


@compiled()
def wide(word, bits):
    """As many random bits as the template has: the word, mixed once more for the upper half."""
    high = np.int64(random_word(word, 0x6A09E667, 0))
    return (high << 32) ^ np.int64(word) if size_of(bits) == 8 else np.int64(word)
