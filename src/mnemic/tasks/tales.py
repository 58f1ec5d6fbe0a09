"""A small world of people with traits, told in sentences, and an ideal reader who knows what every word costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator

from mnemic.tasks.base import shuffled
from mnemic.tasks.text import word_list

NAMES = word_list("""
    ada bela cora dora edgar finn greta hugo iris jonas klara liam mona nils olga piet quinn rosa sven thea ulla vera
    wanda xenia yann zora arno britta carl dina emil frida""")
TRAITS = {
    "works": word_list("""
        baker miller weaver potter smith tailor fisher hunter farmer shepherd gardener carpenter mason painter printer
        sailor porter teacher doctor lawyer judge clerk piper cook"""),
    "lives": word_list("""
        ashford birchley crowhill dunmere eastwick fernham glenrock hazelton ironbridge jarrow kingsey larkfield
        marlow northam oakley penrith queensbury ripley stonegate thornby upton vellum westbourne yarrow"""),
    "keeps": word_list("""
        badger canary donkey falcon ferret goat goose hamster hare hedgehog heron lamb lizard mouse owl parrot pigeon
        pony rabbit raven robin squirrel swan turtle"""),
    "owns": word_list("""
        basket blanket bottle bucket candle clock compass drum fiddle hammer kettle ladder lantern locket map mirror
        needle purse ring saddle scarf shovel trunk wheel"""),
    "likes": word_list("""
        apples barley beans bread butter cabbage carrots cheese cherries figs ginger grapes honey leeks lentils mint
        mustard olives onions pears plums radishes soup turnips"""),
    "fears": word_list("""
        bees bells bulls cellars crowds darkness drums fevers fire fog ghosts heights ice lightning mirrors moths rats
        silence snakes spiders storms thunder wasps wolves"""),
}
PLACES = word_list("""
    abbey bakery bank barn bridge castle cave chapel cliff dock fair ferry field forge fountain garden gate hall
    harbour hill inn lake library market""")
FORMS = {
    "works": "works as a {} .",
    "lives": "lives in {} now .",
    "keeps": "keeps a {} .",
    "owns": "owns a {} .",
    "likes": "likes {} most .",
    "fears": "fears {} most .",
    "meets": "meets {} again .",
    "walks": "walks to the {} .",
}
"""What follows a name; the first word tells the kind of sentence, one of eight."""

OPENING = "here begins a tale ."
CHOICES = {**{kind: len(values) for kind, values in TRAITS.items()}, "walks": len(PLACES)}


def tale(cast: int, sentences: int, generator: Generator) -> list[str]:
    """A document as sentences, the first of which is the same for all."""
    people = shuffled(1, len(NAMES), generator)[0, :cast].tolist()
    traits = {kind: torch.randint(len(TRAITS[kind]), (cast,), generator=generator).tolist() for kind in TRAITS}
    who = torch.randint(cast, (sentences,), generator=generator).tolist()
    kinds = torch.randint(len(FORMS), (sentences,), generator=generator).tolist()
    other = torch.randint(1, cast, (sentences,), generator=generator).tolist()
    place = torch.randint(len(PLACES), (sentences,), generator=generator).tolist()
    told = [OPENING]
    for number, person in enumerate(who):
        kind = list(FORMS)[kinds[number]]
        if kind == "walks":
            word = PLACES[place[number]]
        elif kind == "meets":
            word = NAMES[people[(person + other[number]) % cast]]
        else:
            word = TRAITS[kind][traits[kind][person]]
        told.append(f"{NAMES[people[person]]} {FORMS[kind].format(word)}")
    return told


@dataclass(frozen=True)
class Word:
    """A word as the reader sees it: `kind` "who", "kind", a trait, "meets", "walks" or "" where it is certain, and
    whom it is about.
    """

    text: str
    kind: str = ""
    person: str = ""


def parse(words: Sequence[str]) -> list[Word]:
    """What each word of a tale is for. A word behind the last full stop may be cut."""
    found: list[Word] = [Word(word) for word in words[: len(OPENING.split())]]
    sentence: list[str] = []
    for word in words[len(found) :]:
        sentence.append(word)
        person, place = sentence[0], len(sentence) - 1
        kind = sentence[1] if place > 0 else ""
        form = FORMS[kind].split() if kind in FORMS else []
        if place < 2:
            found.append(Word(word, "who" if place == 0 else "kind", person))
        elif place - 1 < len(form) and form[place - 1] == "{}":
            found.append(Word(word, kind, person))
        else:
            found.append(Word(word))
        if word == ".":
            sentence = []
    return found


def facts_told(words: Sequence[Word]) -> set[tuple[str, str]]:
    """Which traits of which people were told."""
    return {(word.person, word.kind) for word in words if word.kind in TRAITS}


def reader_bits(
    words: Sequence[Word], segment: Sequence[int], earlier: Sequence[Sequence[int]], cast: int
) -> list[float]:
    """What an ideal reader pays for each word, in bits: -log2 of its probability, exact under the rules of the world.

    `segment` tells in which segment each word begins, `earlier` for each segment which earlier ones the reader
    remembers. A reader that has forgotten something still knows how the sentence began that it is in.

    A person is known if their name was read. With `n` of the cast known, a sentence begins with each of them with
    probability `1 / cast`, and with every other name with `(cast - n) / cast / (names - n)`. A trait that was read is
    certain, another one is any of its list.
    """
    people: dict[str, set[int]] = {}
    traits: dict[tuple[str, str], set[int]] = {}
    bits = []
    for place, (word, here) in enumerate(zip(words, segment, strict=True)):
        remembered = {here, *earlier[here]}
        known = {name for name, mentions in people.items() if not mentions.isdisjoint(remembered)}
        if word.kind in ("who", "meets"):
            # nobody meets themselves
            known -= {word.person} if word.kind == "meets" else set()
            left, names = cast - (word.kind == "meets"), len(NAMES) - (word.kind == "meets")
            new = word.text not in known
            chance = (left - len(known)) / left / (names - len(known)) if new else 1 / left
            bits.append(-math.log2(chance) if chance > 0 else 0.0)  # a cut name may be none
            if place + 1 < len(words):  # the last word may be cut
                people.setdefault(word.text, set()).add(here)
        elif word.kind == "kind":
            bits.append(math.log2(len(FORMS)))
        elif word.kind in TRAITS:
            mentions = traits.setdefault((word.person, word.kind), set())
            bits.append(math.log2(CHOICES[word.kind]) if mentions.isdisjoint(remembered) else 0.0)
            mentions.add(here)
        else:
            bits.append(math.log2(CHOICES["walks"]) if word.kind == "walks" else 0.0)
    return bits
