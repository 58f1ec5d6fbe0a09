"""Things that are told: subjects, relations, values and the sentences that tell, ask, correct and take them back.

A fact is a subject, one of its relations and a value: Maren, favourite colour, teal. The vocabulary is wide, as a
memory learns a narrow one by heart instead of learning to remember: with 130 values held-out ones were never answered.
Names and places are made of syllables, things of two words, numbers and dates of digits, and there are lists. What is
held out for tests is so by its hash: a value, a name is either trained on or tested on, on every machine. Wordings and
relations are held out by their place in the lists.

The lists and the sentences are ours. `mnemic.tasks.told` makes streams of them.
"""

from __future__ import annotations

import functools
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]

NOT_TOLD = "I was not told."
"""The answer where nothing was told, or what was told was taken back."""

# --- words -----------------------------------------------------------------------------------------------------------

STARTS = "Al An Ar Bel Ben Bor Cal Car Cor Da Del Dor El Em Er Fa Fen Gar Gil Hal Har Hel Il Is Jan Jor Ka Kel Kir"
STARTS += " La Len Lor Ma Mar Mel Mi Mor Na Nel Nor Ol Or Pa Per Pol Ra Ren Ro Sa Sel Sil Ta Tam Ter Tor Ul Va Ver Wil"
MIDDLES = "a an ar da de di do e el en i ia il in la le li lo ma mi na ne ni o on or ra re ri ro sa ta te ti va vi"
ENDS = "a an as ella en ena er ia ian ida ik in ina is ius on ora os us ya"
TOWNS = "bury by dale den field fjord ford gate ham haven holm hurst mere mouth port stad stead ton ville wick wood"
FIRST = """Adam Agnes Alice Amir Anita Anna Arthur Aisha Ben Bianca Boris Carla Carlos Chen Clara Daniel David Diana
Dmitri Edith Elena Emil Emma Erik Esther Eva Fatima Felix Fiona Frank George Grace Greta Hana Hannah Hassan Heidi Helen
Henry Hugo Ida Igor Ines Irene Isaac Ivan Jack Jakob James Jane Jasmin Joan Johan Jonas Judith Julia Karim Karl Kate
Keiko Kofi Lara Laura Lena Leo Liam Lily Lina Linda Lucas Lucy Luis Maja Marco Maria Marta Martin Mary Mateo Max Mei
Mia Mina Miriam Mona Nadia Nina Noah Nora Olga Oliver Omar Oscar Otto Paul Paula Pedro Peter Petra Philip Priya Rachel
Ravi Rita Robert Rosa Ruth Samir Samuel Sara Simon Sofia Sonja Stefan Susan Tara Theo Thomas Tom Uma Ursula Vera Victor
Walter Wanda Wei William Yara Yusuf Zara Zoe"""
ADJECTIVES = """ancient black blue brass broken brown carved cheap clay copper cracked crooked empty faded folding
foreign glass golden green grey heavy huge iron knitted large leather linen little long narrow new old orange painted
paper pink plain plastic polished purple red round rusty sharp shiny short silk silver small soft spare square steel
stolen straw striped tall thick thin tiny velvet warm wet white wide wooden woollen yellow"""
NOUNS = """anchor apron axe bag ball banner basket bell belt bench bicycle blanket boat book bottle bowl bracelet brick
broom brush bucket button cabinet camera candle cap card carpet chain chair chest clock coat coin comb compass crown
cup curtain dagger desk diary dish doll drum envelope fan feather flag flute fork frame glove guitar hammer harp hat
helmet hook horn jacket jar jug kettle key kite knife ladder lamp lantern lens letter lock map mask mat medal mirror
mug nail napkin needle net notebook oar organ paddle painting pan parcel pen pencil piano pillow pin pipe plate plough
pot purse puzzle quilt radio rake razor ribbon ring robe rope rug sack saddle sail saw scarf scissors shawl shield ship
shirt shoe shovel skirt sled spade spoon stamp statue stick stone stool sword table tent ticket tool torch towel toy
trumpet trunk umbrella vase violin wagon wallet watch wheel whistle wig"""
COLOURS = """amber aqua beige black blue bronze brown burgundy charcoal copper coral cream crimson emerald gold green
grey indigo ivory khaki lavender lilac lime magenta maroon mustard navy ochre olive orange peach pink plum purple red
ruby rust salmon sand scarlet silver tan teal turquoise violet white yellow"""
FOODS = """almonds apples apricots bacon bananas barley beans beef beetroot bread broccoli butter cabbage cake carrots
celery cheese cherries chestnuts chicken chocolate cinnamon coconut corn crab cucumber curry dates duck dumplings eggs
figs fish garlic ginger grapes ham honey jam lamb leeks lemons lentils lobster mangoes melon milk mushrooms mustard
noodles nuts oats olives onions oranges oysters pancakes parsley pasta peaches peanuts pears peas pepper pies pizza
plums porridge potatoes pumpkin radishes rice salad salmon sausages shrimp soup spinach strawberries tofu tomatoes
trout tuna turkey turnips vinegar waffles walnuts yoghurt"""
JOBS = """actor architect baker banker barber blacksmith bookseller brewer builder butcher captain carpenter chemist
clerk clown coach cook dancer dentist designer diver doctor driver editor electrician engineer farmer firefighter
fisher florist gardener geologist glazier guard guide hunter jeweller joiner journalist judge lawyer librarian
locksmith mason mechanic midwife miller miner musician nurse optician painter pharmacist photographer pilot plumber
poet porter postman potter printer professor roofer sailor sculptor shepherd shoemaker singer smith soldier surgeon
tailor teacher translator vet waiter weaver welder writer"""
INSTRUMENTS = """accordion banjo bassoon bagpipes bugle cello clarinet cornet cymbals drums fiddle flute guitar
harmonica harp harpsichord horn lute mandolin oboe organ piano piccolo recorder saxophone sitar tambourine triangle
trombone trumpet tuba ukulele viola violin xylophone zither"""
ANIMALS = """badger bear beaver bee bull camel canary cat cobra cow crane cricket crow deer dog dolphin donkey dove duck
eagle eel elephant falcon ferret finch fox frog giraffe goat goose hamster hare hawk hedgehog hen heron horse jackal
kangaroo lark leopard lion lizard llama lynx magpie mole monkey moose moth mouse mule newt octopus ostrich otter owl ox
panda panther parrot peacock pelican penguin pheasant pig pigeon pony quail rabbit rat raven robin salmon seal shark
sheep snail snake sparrow spider squirrel stork swan tiger toad tortoise trout turkey turtle viper wasp weasel whale
wolf wren zebra"""
HOBBIES = """archery astronomy baking ballet baseball basketball birdwatching bowling boxing calligraphy camping
canoeing chess climbing cricket cycling darts diving drawing fencing fishing football gardening golf gymnastics hiking
hockey hunting judo juggling karate knitting origami painting photography poetry pottery reading rowing rugby running
sailing sewing singing skating skiing surfing swimming tennis volleyball weaving wrestling yoga"""
LANGUAGES = """Arabic Basque Bengali Breton Bulgarian Catalan Chinese Croatian Czech Danish Dutch Estonian Finnish
French Gaelic Georgian German Greek Hebrew Hindi Hungarian Icelandic Irish Italian Japanese Korean Latin Latvian
Lithuanian Malay Maltese Mongolian Norwegian Persian Polish Portuguese Romanian Russian Serbian Slovak Spanish Swahili
Swedish Tamil Thai Tibetan Turkish Ukrainian Urdu Vietnamese Welsh Yiddish Zulu"""
MONTHS = "January February March April May June July August September October November December"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"


@functools.cache
def words(text: str) -> tuple[str, ...]:
    """The words of a list."""
    return tuple(text.split())


def held_out(text: str) -> bool:
    """Whether a name or a value is kept for tests: one of five, by its hash."""
    return zlib.crc32(text.encode()) % 5 == 0


def _of(luck: random.Random, listed: str) -> str:
    return luck.choice(words(listed))


def _invented(luck: random.Random) -> str:
    middle = _of(luck, MIDDLES) if luck.random() < 0.5 else ""
    return _of(luck, STARTS) + middle + _of(luck, ENDS)


VALUES: dict[str, Callable[[random.Random], str]] = {
    "name": lambda luck: _of(luck, FIRST) if luck.random() < 0.3 else _invented(luck),
    "place": lambda luck: _of(luck, STARTS) + (_of(luck, MIDDLES) if luck.random() < 0.5 else "") + _of(luck, TOWNS),
    "thing": lambda luck: f"{_of(luck, ADJECTIVES)} {_of(luck, NOUNS)}",
    "number": lambda luck: str(luck.randrange(10, 10 ** luck.choice((2, 3, 4)))),
    "date": lambda luck: f"{luck.randrange(1, 29)} {_of(luck, MONTHS)}",
    "year": lambda luck: str(luck.randrange(1900, 2030)),
    "time": lambda luck: f"{luck.randrange(1, 13)}:{luck.choice(('00', '10', '15', '20', '30', '40', '45', '50'))}",
    "day": lambda luck: _of(luck, DAYS),
    "colour": lambda luck: _of(luck, COLOURS),
    "food": lambda luck: _of(luck, FOODS),
    "job": lambda luck: _of(luck, JOBS),
    "instrument": lambda luck: _of(luck, INSTRUMENTS),
    "animal": lambda luck: _of(luck, ANIMALS),
    "hobby": lambda luck: _of(luck, HOBBIES),
    "language": lambda luck: _of(luck, LANGUAGES),
}
"""How a value of each kind is drawn."""

ALWAYS_SHARED = ("day", "year", "time")
"""Kinds of few values, which tests share with training."""


@dataclass(frozen=True)
class Relation:
    """What can be told of a subject: as it is called ("favourite colour"), and the kind of its values."""

    noun: str
    kind: str


RELATIONS = tuple(
    Relation(noun, kind)
    for kind, nouns in {
        "name": (
            "sister, brother, mother, father, best friend, neighbour, teacher, boss, dog, cat, horse, first child, "
            "landlord, dentist, middle name, rival"
        ),
        "place": "home town, birthplace, favourite city, office, holiday place, next stop, school",
        "thing": "birthday present, lucky charm, most precious thing, latest purchase, lost item, prize",
        "number": "room number, locker number, house number, ticket number, code, badge number, lucky number, age",
        "date": "birthday, wedding day, departure date, exam date, first day at work",
        "year": "year of birth, year of graduation",
        "time": "meeting time, bedtime, train",
        "day": "day off, market day",
        "colour": "favourite colour, front door colour, car colour, eye colour",
        "food": "favourite food, breakfast, allergy, least favourite food",
        "job": "job, first job, dream job",
        "instrument": "instrument, favourite instrument",
        "animal": "pet, favourite animal, totem",
        "hobby": "hobby, favourite sport",
        "language": "first language, second language",
    }.items()
    for noun in nouns.split(", ")
)
HELD_OUT_RELATIONS = tuple(RELATIONS[::9])
"""Never trained on."""

# --- sentences -------------------------------------------------------------------------------------------------------

# s the subject with its 's ("Maren's", "my"), n the relation, v the value, o the value before
TELL = (
    "{s} {n} is {v}.",
    "Remember that {s} {n} is {v}.",
    "Please note: {s} {n} is {v}.",
    "As far as I know, {s} {n} is {v}.",
    "By the way, {s} {n} is {v}.",
    "{s} {n}: {v}.",
    "I have just heard that {s} {n} is {v}.",
    "Everybody knows that {s} {n} is {v}.",
    "For the record, {s} {n} is {v}.",
    "If anybody asks for {s} {n}, it is {v}.",
    "It turned out that {s} {n} is {v}.",
    "You should know that {s} {n} is {v}.",
    "Did you know? {s} {n} is {v}.",
    "What {s} {n} is? It is {v}.",
    "They say {s} {n} is {v}.",
    # held out
    "Let me tell you {s} {n}: it is {v}.",
    "In case you wonder, {s} {n} is {v}.",
    "Write this down, {s} {n} is {v}.",
)
ASK = (
    "What is {s} {n}?",
    "Do you know {s} {n}?",
    "Tell me {s} {n}.",
    "What was {s} {n} again?",
    "Remind me, what is {s} {n}?",
    "{s} {n}?",
    "I forgot {s} {n}. What is it?",
    "Can you say what {s} {n} is?",
    "Somebody asks for {s} {n}.",
    "Name {s} {n}.",
    # held out
    "I would like to know {s} {n}.",
    "Could you look up {s} {n}?",
)
CORRECT = (
    "No, {s} {n} is not {o} but {v}.",
    "Correction: {s} {n} is {v}.",
    "{s} {n} has changed, it is now {v}.",
    "I was wrong, {s} {n} is {v}.",
    "From now on {s} {n} is {v}.",
    # held out
    "Sorry, I meant {v}: that is {s} {n}.",
)
RETRACT = (
    "Forget what I said of {s} {n}.",
    "Nobody knows {s} {n} any more.",
    "What I said of {s} {n} is not true.",
    # held out
    "Please delete {s} {n}.",
)
HELD_OUT_WORDINGS: dict[tuple[str, ...], int] = {TELL: 3, ASK: 2, CORRECT: 1, RETRACT: 1}
"""How many of each list, at its end, are for tests alone."""


def wording(luck: random.Random, listed: tuple[str, ...], split: Split) -> str:
    """One of the sentences that a split may use."""
    kept = HELD_OUT_WORDINGS[listed]
    return luck.choice(listed[-kept:] if split == "test" else listed[:-kept])


@dataclass(frozen=True)
class Fact:
    """What is told: of whom, what, and the value; `subject` is a name, or "I"."""

    subject: str
    relation: Relation
    value: str

    def sentence(self, form: str, before: str = "") -> str:
        """The fact in one of the wordings, beginning with a capital letter."""
        whose = "my" if self.subject == "I" else f"{self.subject}'s"
        said = form.format(s=whose, n=self.relation.noun, v=self.value, o=before)
        return said[0].upper() + said[1:]


class Teller:
    """Draws facts: `held_out_relations` only for tests of relations that training never met."""

    def __init__(self, split: Split = "train", held_out_relations: bool = False) -> None:
        self.split: Split = split
        kept = set(HELD_OUT_RELATIONS)
        self.relations = [each for each in RELATIONS if (each in kept) == held_out_relations]

    def draw(self, luck: random.Random, kind: str) -> str:
        """A value of a kind that the split may use."""
        while True:
            value = VALUES[kind](luck)
            if kind in ALWAYS_SHARED or held_out(value) == (self.split == "test"):
                return value

    def facts(self, luck: random.Random, count: int, first_person: float = 0.2) -> list[Fact]:
        """`count` facts, no two of the same subject and relation. Half of the time one subject has several, so that its
        name alone does not tell which is asked for; half of the time subjects share a relation.
        """
        found: dict[tuple[str, Relation], Fact] = {}
        while len(found) < count:
            same = luck.random() if found else 1.0
            last = next(reversed(found.values())) if found else None
            subject = "I" if luck.random() < first_person else self.draw(luck, "name")
            relation = luck.choice(self.relations)
            if last is not None and same < 0.25:
                subject = last.subject
            elif last is not None and same < 0.5:
                relation = last.relation
            fact = Fact(subject, relation, self.draw(luck, relation.kind))
            found.setdefault((subject, relation), fact)
        return list(found.values())

    def other_value(self, luck: random.Random, fact: Fact) -> Fact:
        """The fact with another value of its kind."""
        while (value := self.draw(luck, fact.relation.kind)) == fact.value:
            pass
        return Fact(fact.subject, fact.relation, value)
