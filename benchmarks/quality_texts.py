"""More training rows for examples/messages and examples/phrases, made by program from what the two have.

A few hundred rows do not teach a model from scratch to copy a word or to inflect it. The held-out files stay as they
are: written one by one, and none of their texts is among the rows made here.
"""

import random
import re
from collections.abc import Iterator

import pandas as pd

from benchmarks.quality_data import ROOT, SEED, Context, example

# What a message of examples/messages may be about: one thing, or several; each can stand in another's place.
_THINGS = (
    "backpack, bed, bench, bike, blanket, blender, book, bowl, box, bucket, candle, carpet, chair, clock, coat, "
    "coffee machine, cupboard, curtain rail, cushion, desk, drawer, dress, drill, fan, fork, freezer, fridge, "
    "frame, garden hose, grill, guitar, hammer, hat, heater, helmet, jacket, jar, jug, kettle, keyboard, knife, "
    "ladder, lamp, mat, mattress, mirror, mixer, mug, pan, phone case, piano, pillow, plant pot, plate, printer, "
    "radio, ring, rug, saw, scale, scarf, shelf, shirt, shower curtain, sink, sofa, speaker, spoon, stool, "
    "suitcase, table, tap, teapot, television, tent, toaster, towel, toy train, tray, vacuum cleaner, vase, "
    "washing machine, watch",
    "bags, boots, bowls, bulbs, candles, chairs, cups, curtains, cushions, forks, glasses, gloves, headphones, "
    "jackets, knives, lamps, mats, mugs, pillows, pans, plates, sandals, scissors, sheets, shoes, skates, "
    "slippers, socks, spoons, stools, tiles, towels, trousers",
)
_SWAPS = 12

# Words of English and German sentences; of a noun its gender, of a verb its forms as in "is buying", "has bought".
_PERSONS = (
    "man Mann m, woman Frau f, girl Mädchen n, child Kind n, father Vater m, mother Mutter f, brother Bruder m, "
    "sister Schwester f, friend Freund m, uncle Onkel m, aunt Tante f, doctor Arzt m, teacher Lehrer m, son Sohn m, "
    "daughter Tochter f, grandfather Großvater m, grandmother Großmutter f, wife Frau f, husband Mann m"
)
_ANIMALS = "dog Hund m, cat Katze f, horse Pferd n, bird Vogel m, cow Kuh f, fish Fisch m"
_OBJECTS = (
    "table Tisch m, chair Stuhl m, letter Brief m, key Schlüssel m, ball Ball m, coat Mantel m, apple Apfel m, cake "
    "Kuchen m, hat Hut m, ticket Karte f, bag Tasche f, clock Uhr f, cup Tasse f, lamp Lampe f, flower Blume f, "
    "newspaper Zeitung f, book Buch n, house Haus n, car Auto n, picture Bild n, boat Boot n, glass Glas n, bed Bett "
    "n, bike Fahrrad n, egg Ei n"
)
_PLACES = (
    "in the garden=im Garten, in the kitchen=in der Küche, at the window=am Fenster, at the school=an der Schule, on "
    "the table=auf dem Tisch, on the chair=auf dem Stuhl, under the table=unter dem Tisch, by the lake=am See, in the "
    "forest=im Wald, in the city=in der Stadt, in front of the house=vor dem Haus, behind the door=hinter der Tür, "
    "next to the church=neben der Kirche, by the sea=am Meer, on the roof=auf dem Dach, on the river=am Fluss, in the "
    "water=im Wasser, in the room=im Zimmer, at the station=am Bahnhof, in the bag=in der Tasche"
)
_WAYS = (
    "home=nach Hause, to work=zur Arbeit, to the doctor=zum Arzt, to the market=zum Markt, to the station=zum "
    "Bahnhof, into the city=in die Stadt, into the garden=in den Garten, to school=zur Schule, to bed=ins Bett"
)
_OF_THINGS = (
    "big=groß, small=klein, old=alt, new=neu, red=rot, green=grün, black=schwarz, white=weiß, beautiful=schön, "
    "broken=kaputt, clean=sauber, heavy=schwer, expensive=teuer, here=hier, brown=braun, blue=blau, cheap=billig"
)
_OF_THE_LIVING = (
    "tired=müde, hungry=hungrig, friendly=freundlich, ill=krank, happy=glücklich, at home=zu Hause, old=alt, "
    "young=jung, here=hier, big=groß, small=klein"
)
_DOING = (
    "buying bought kauft gekauft, looking-for looked-for sucht gesucht, reading read liest gelesen, seeing seen sieht "
    "gesehen, carrying carried trägt getragen, washing washed wäscht gewaschen, finding found findet gefunden, "
    "selling sold verkauft verkauft, writing written schreibt geschrieben, eating eaten isst gegessen"
)
_BEING = (
    "sitting sitzt, standing steht, sleeping schläft, working arbeitet, lying liegt, playing spielt, waiting wartet"
)
_MODALS = "can=kann, has to=muss, wants to=will"
_DEEDS = (
    "swim=schwimmen, sleep=schlafen, work=arbeiten, eat=essen, read=lesen, write=schreiben, go home=nach Hause gehen"
)
_ARTICLES = {"nominative": "der die das", "accusative": "den die das"}
_ENDINGS = {"nominative": ("", "e", ""), "accusative": ("en", "e", "")}
_OWNERS = "my=mein, your=dein, a=ein"
_COMPOSED = 4000


def messages(context: Context) -> list[str]:
    """examples/messages, each training row repeated a dozen times with another thing in its place, in both texts.

    So few messages do not teach a model to take the thing from the text; these do, although not all make sense.
    """
    chance = random.Random(SEED)
    kinds = [kind.split(", ") for kind in _THINGS]
    rows = pd.read_csv(ROOT / "examples" / "messages" / "train.csv")
    written = [(text, summary) for text, summary in rows.itertuples(index=False)]
    more = []
    for text, summary in written:
        found = [thing for kind in kinds for thing in kind if _whole(thing).search(text)]
        # What the summary is about, if it names a thing; of "lamp" and "bike lamp" the longer.
        thing = max(found, key=lambda thing: (bool(_whole(thing).search(summary)), len(thing)), default="")
        others = chance.sample(next((kind for kind in kinds if thing in kind), [""] * _SWAPS), _SWAPS)
        more += [(_swap(thing, other, text), _swap(thing, other, summary)) for other in others]
    place = context.work / "messages-train.csv"
    pd.DataFrame(written + more, columns=rows.columns).to_csv(place, index=False)
    return ["--train-file", str(place), *example("messages")[2:]]


def _whole(thing: str) -> re.Pattern[str]:
    return re.compile(rf"\b{thing}\b", re.IGNORECASE)


def _swap(thing: str, other: str, text: str) -> str:
    """A text with `other` in place of a thing, with a capital letter where that has one."""
    if not thing:
        return text
    return _whole(thing).sub(lambda match: other.capitalize() if match[0][0].isupper() else other, text)


def phrases(context: Context) -> list[str]:
    """examples/phrases, its training rows and sentences composed of the words that they have."""
    folder = ROOT / "examples" / "phrases"
    rows, *held_out = (pd.read_csv(folder / f"{name}.csv") for name in ("train", "validation", "test"))
    known = {word for column in rows for text in rows[column] for word in _words(text)}
    taken = {text for split in (rows, *held_out) for text in split["source"]}
    composed = {
        english: german
        for english, german in _sentences(random.Random(SEED))
        if english not in taken and known.issuperset(_words(f"{english} {german}"))
    }
    place = context.work / "phrases-train.csv"
    pd.concat([rows, pd.DataFrame(composed.items(), columns=rows.columns)]).to_csv(place, index=False)
    return ["--train-file", str(place), *example("phrases")[2:]]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _sentences(chance: random.Random) -> Iterator[tuple[str, str]]:
    """Pairs of an English sentence and its German translation."""

    def pick(listed: str) -> tuple[str, str]:
        english, german = chance.choice(listed.split(", ")).split("=")
        return english, german

    def noun(listed: str, case: str = "nominative") -> tuple[str, str]:
        english, german, gender = chance.choice(listed.split(", ")).split()
        number = "mfn".index(gender)
        if chance.random() < 0.5:
            return f"the {english}", f"{_ARTICLES[case].split()[number]} {german}"
        owner, stem = pick(_OWNERS)
        owner += "n" * (owner == "a" and english[0] in "aeiou")
        return f"{owner} {english}", f"{stem}{_ENDINGS[case][number]} {german}"

    def somebody() -> tuple[str, str]:
        return chance.choice([("he", "er"), ("she", "sie"), noun(_PERSONS), noun(_PERSONS), noun(_ANIMALS)])

    for _ in range(_COMPOSED):
        who, wer = somebody()
        what, was = noun(_OBJECTS)
        whom, wen = noun(f"{_OBJECTS}, {_ANIMALS}", "accusative")
        where, wo = pick(_PLACES)
        way, wohin = pick(_WAYS)
        state, zustand = pick(_OF_THE_LIVING)
        look, aussehen = pick(_OF_THINGS)
        modal, modalverb = pick(_MODALS)
        deed, tat = pick(_DEEDS)
        be, ist = chance.choice(_BEING.split(", ")).split()
        doing, done, tut, getan = (word.replace("-", " ") for word in chance.choice(_DOING.split(", ")).split())
        english, german = chance.choice(
            [
                (f"{what} is {look}.", f"{was} ist {aussehen}."),
                (f"{who} is {state}.", f"{wer} ist {zustand}."),
                (f"is {what} {look}?", f"ist {was} {aussehen}?"),
                (f"where is {what}?", f"wo ist {was}?"),
                (f"{what} is {where}.", f"{was} ist {wo}."),
                (f"{who} is {be} {where}.", f"{wer} {ist} {wo}."),
                (f"{who} is {doing} {whom}.", f"{wer} {tut} {wen}."),
                (f"{who} has {done} {whom}.", f"{wer} hat {wen} {getan}."),
                (f"{who} is going {way}.", f"{wer} geht {wohin}."),
                (f"{who} {modal} {deed}.", f"{wer} {modalverb} {tat}."),
                (f"{who} has {whom}.", f"{wer} hat {wen}."),
            ]
        )
        yield english[0].upper() + english[1:], german[0].upper() + german[1:]
