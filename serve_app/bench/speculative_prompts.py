"""Prompts for measuring speculative decoding: some whose answers repeat them."""

from __future__ import annotations

import random
from collections.abc import Callable

_PASSAGES = (
    "The harbour office opens at six. Boats that carry fish go to the long pier, boats that carry"
    " stone go to the old one. Each skipper writes the name of the boat, the weight of the load"
    " and the hour of arrival into the book by the door.",
    "A bicycle wheel is trued with a spoke key. Turn the wheel slowly and watch the gap between"
    " the rim and the brake pad. Where the rim comes too near on the left, loosen the left spoke a"
    " quarter of a turn and tighten the right spoke a quarter of a turn.",
    "The library lends books for four weeks. A book that nobody waits for may be kept for four"
    " weeks more. Whoever loses a book pays its price and a small fee, and whoever finds it again"
    " within a year gets the price back.",
    "Bread needs flour, water, salt and time. Mix the flour and the water, wait half an hour, then"
    " add the salt. Fold the dough four times in two hours, shape it, and let it rest in the cold"
    " until the next morning.",
    "The valley has three rivers. The northern river is short and fast, the middle river is broad"
    " and slow, and the southern river runs dry in late summer. All three meet above the town, next"
    " to the mill that gave the town its name.",
    "The meeting began at nine. The first item was the budget, the second item was the new roof,"
    " and the third item was the choice of a date for the summer fair. The budget was passed, the"
    " roof was put off, and the fair will be held in July.",
    "To plant a tree, dig a hole twice as wide as its roots and just as deep. Loosen the soil at"
    " the sides, set the tree upright, fill the hole with the same soil, and water it. Water it"
    " again each week until autumn.",
    "The train to the coast leaves from platform two. It stops at the university, at the airport"
    " and at the old market. Passengers with bicycles use the last carriage, passengers with heavy"
    " bags use the first carriage.",
)
_QUESTIONS = (
    "Why is the sky blue?",
    "Give me three ideas for a birthday party.",
    "What is the difference between weather and climate?",
    "How do I learn to swim as an adult?",
    "Write a short story about a lighthouse.",
    "What makes a good friend?",
    "Explain what a computer program is.",
    "Describe a walk through a forest in autumn.",
    "How does a vaccine work?",
    "Plan a weekend in a small town.",
    "What should I cook for four guests?",
    "Why do people like music?",
)
_NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas")
_TOWNS = ("Bergen", "Porto", "Krakow", "Lyon", "Turin", "Ghent", "Malmo", "Cork", "Graz", "Split")
_GOODS = ("lamps", "chairs", "clocks", "kettles", "tables", "mirrors", "baskets", "blankets")


def make_prompts(name: str, count: int, seed: int) -> list[str]:
    """Return `count` user messages of the workload `name`, the same for the same seed."""
    rng = random.Random(f"{name}/{seed}")
    return [WORKLOADS[name](rng) for _ in range(count)]


def _copy(rng: random.Random) -> str:
    text = " ".join(rng.sample(_PASSAGES, 2))
    return f"Repeat the following text word for word, and write nothing else.\n\n{text}"


def _extract(rng: random.Random) -> str:
    lines = [
        f"{name} from {rng.choice(_TOWNS)} ordered {rng.randrange(2, 60)} {rng.choice(_GOODS)}"
        f" for {rng.randrange(100, 9000)} euros."
        for name in rng.sample(_NAMES, 5)
    ]
    example = '[{"name": "Karl", "town": "Basel", "number": 3, "goods": "pens", "price": 12}, ...]'
    return f"Write these orders as JSON, like {example}\n\n" + "\n".join(lines)


def _chat(rng: random.Random) -> str:
    return rng.choice(_QUESTIONS)


WORKLOADS: dict[str, Callable[[random.Random], str]] = {
    "copy": _copy,
    "extract": _extract,
    "chat": _chat,
}
"""copy: the answer is the prompt's text. extract: its values in another form. chat: neither."""
