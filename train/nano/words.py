"""What nano speaks about: a closed vocabulary, and sentences made of it."""

from __future__ import annotations

import hashlib

import numpy as np

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "black", "white", "grey")
SHAPES = ("circle", "square", "triangle", "star", "cross", "oval", "diamond", "heart")
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "twenty", "thirty", "fifty", "hundred",
)  # fmt: skip
DIRECTIONS = ("left", "right", "up", "down")
# Things that can be drawn, by the name that all three drawing sets have (see `pictures`).
THINGS = (
    "dog", "cat", "horse", "cow", "pig", "mouse", "rabbit", "bear", "monkey", "lion", "tiger", "elephant", "sheep",
    "goat", "camel", "frog", "turtle", "snake", "whale", "dolphin", "fish", "octopus", "snail", "butterfly", "ant",
    "bee", "spider", "bird", "penguin", "chicken", "duck", "eagle", "owl", "bat", "wolf", "fox", "flower", "rose",
    "sunflower", "tree", "cactus", "mushroom", "apple", "pear", "peach", "cherry", "strawberry", "grapes", "melon",
    "watermelon", "lemon", "banana", "pineapple", "tomato", "corn", "carrot", "bread", "cheese", "egg", "pizza",
    "hamburger", "cake", "cookie", "candy", "honey", "milk", "coffee", "tea", "spoon", "knife", "house", "castle",
    "tent", "bridge", "train", "bus", "car", "truck", "tractor", "bicycle", "ship", "boat", "rocket", "airplane",
    "helicopter", "clock", "watch", "umbrella", "snowman", "fire", "sun", "moon", "cloud", "rainbow", "ball",
    "balloon", "gift", "kite", "guitar", "piano", "violin", "trumpet", "drum", "bell", "book", "pencil", "scissors",
    "key", "lock", "hammer", "candle", "bed", "chair", "door", "bucket", "basket", "crown", "hat", "shirt",
    "shoe", "sock", "glasses", "ring", "robot", "camera", "telephone", "computer", "television", "radio", "battery",
)  # fmt: skip
PEOPLE = ("man", "woman", "boy", "girl", "teacher", "doctor", "farmer", "baker", "driver", "king", "queen", "friend")
PLACES = (
    "garden", "kitchen", "river", "forest", "mountain", "island", "city", "village", "school", "market", "office",
    "street", "beach", "field", "station", "hospital",
)  # fmt: skip
VERBS = (
    "sees", "finds", "takes", "brings", "likes", "wants", "buys", "sells", "paints", "washes", "carries", "opens",
    "closes", "moves", "hides", "shows", "holds", "keeps", "breaks", "cleans", "counts", "draws", "hears", "remembers",
)  # fmt: skip
ADJECTIVES = (
    "big", "small", "old", "new", "young", "happy", "quiet", "loud", "fast", "slow", "heavy", "light", "warm", "cold",
    "clean", "dirty", "strong", "beautiful", "empty", "broken", "soft", "round", "long", "short",
)  # fmt: skip
TIMES = (
    "today", "tomorrow", "yesterday", "always", "never", "often", "again", "now", "later", "monday", "friday",
    "sunday", "morning", "evening", "night", "winter", "summer",
)  # fmt: skip
SMALL = (
    "the", "a", "and", "or", "with", "without", "in", "on", "under", "near", "behind", "from", "to", "is", "are",
    "was", "has", "not", "this", "that", "my", "your", "his", "her", "every", "some", "many", "very", "there", "it",
    "what", "which", "who", "where", "when", "how", "color", "shape", "thing", "picture", "moving", "hello", "please",
    "thanks", "yes", "no", "good", "water", "music", "paper", "number", "word", "animal", "fruit", "first", "last",
    "second", "say", "said", "write", "read", "tell", "me", "you", "i", "we", "at", "of", "for", "does", "move",
    "goes", "way", "time", "shapes", "things", "before", "after", "here",
)  # fmt: skip
VOCABULARY = tuple(dict.fromkeys(
    (*SMALL, *COLOURS, *SHAPES, *NUMBERS, *DIRECTIONS, *THINGS, *PEOPLE, *PLACES, *VERBS, *ADJECTIVES, *TIMES)
))  # fmt: skip
# All words that occur: those that are drawn one by one, and one that only phrases have.
WORDS = (*VOCABULARY, "hear")

SPLITS = ("train", "validation", "test")
SHARES = (0.94, 0.03, 0.03)


def split_of(text: str) -> str:
    """Which of the three sets a text belongs to: by its hash, so that no text is ever in two of them."""
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
    return SPLITS[int(np.searchsorted(np.cumsum(SHARES)[:-1], place, side="right"))]


def free(rng: np.random.Generator, least: int = 3, most: int = 8) -> str:
    """Words in free order, each as likely as any other."""
    return " ".join(rng.choice(VOCABULARY, int(rng.integers(least, most + 1))))


def _noun(rng: np.random.Generator) -> str:
    kind = rng.integers(4)
    if kind == 0:
        return f"{rng.choice(['the', 'a', 'my', 'your', 'this', 'that'])} {rng.choice(PEOPLE)}"
    first = rng.choice(["the", "a", "my", "your", "his", "her", "this", "every"])
    middle = rng.choice(COLOURS) if kind == 1 else rng.choice(ADJECTIVES) if kind == 2 else ""
    return " ".join(f"{first} {middle} {rng.choice(THINGS)}".split())


def phrase(rng: np.random.Generator) -> str:
    """A sentence with an order of words that people would use."""
    place = f"{rng.choice(['in', 'near', 'behind', 'from'])} the {rng.choice(PLACES)}"
    kind = rng.integers(6)
    if kind == 0:
        return f"{_noun(rng)} {rng.choice(VERBS)} {_noun(rng)} {place}"
    if kind == 1:
        return f"{_noun(rng)} {rng.choice(VERBS)} {_noun(rng)} {rng.choice(TIMES)}"
    if kind == 2:
        return f"there are {rng.choice(NUMBERS[2:])} {rng.choice(COLOURS)} {rng.choice(SHAPES)} {place}"
    if kind == 3:
        return f"{_noun(rng)} is {rng.choice(['very', 'not', 'always', 'never'])} {rng.choice(ADJECTIVES)}"
    if kind == 4:
        return f"{rng.choice(TIMES)} {_noun(rng)} was {place} with {_noun(rng)}"
    return (
        f"{rng.choice(PEOPLE)} and {rng.choice(PEOPLE)} {rng.choice(['often', 'never'])} hear the {rng.choice(THINGS)}"
    )


def sentence(rng: np.random.Generator) -> str:
    """Half in free order, half as people would say it."""
    return free(rng) if rng.integers(2) else phrase(rng)


def sentences(split: str, count: int, seed: int) -> list[str]:
    """Different sentences of one of the three sets. The same for the same arguments."""
    rng, found = np.random.default_rng([seed, SPLITS.index(split)]), dict[str, None]()
    while len(found) < count:
        text = sentence(rng)
        if split_of(text) == split:
            found[text] = None
    return list(found)
