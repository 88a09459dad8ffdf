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
    "buying bought kauft kaufen gekauft, looking-for looked-for sucht suchen gesucht, "
    "reading read liest lesen gelesen, "
    "seeing seen sieht sehen gesehen, carrying carried trägt tragen getragen, washing washed wäscht waschen gewaschen, "
    "finding found findet finden gefunden, writing written schreibt schreiben geschrieben, "
    "eating eaten isst essen gegessen, drawing drawn zeichnet zeichnen gezeichnet, painting painted malt malen gemalt"
)
_BEING = (
    "sitting sitzt sitzen, standing steht stehen, sleeping schläft schlafen, working arbeitet arbeiten, "
    "lying liegt liegen, playing spielt spielen, waiting wartet warten, living wohnt wohnen, singing singt singen"
)
_MODALS = "can=can kann kann können, have-to=has-to muss muss müssen, want-to=wants-to will will wollen"
_DEEDS = (
    "swim=schwimmen, sleep=schlafen, work=arbeiten, eat=essen, read=lesen, write=schreiben, sing=singen, dance=tanzen, "
    "wait=warten, go home=nach Hause gehen, learn German=Deutsch lernen, drink tea=Tee trinken"
)
_MANY = (
    "flowers Blumen, books Bücher, children Kinder, apples Äpfel, houses Häuser, dogs Hunde, cats Katzen, "
    "shoes Schuhe, "
    "parents Eltern, friends Freunde, birds Vögel, keys Schlüssel, letters Briefe, plates Teller, glasses Gläser"
)
_ARTICLES = {"nominative": "der die das", "accusative": "den die das"}
_ENDINGS = {"nominative": ("", "e", ""), "accusative": ("en", "e", "")}
_OWNERS = "my=mein, your=dein, a=ein"
# A subject decides the form of the verb: of I, of one, of several.
_FORMS = (("am", "have", "bin", "habe"), ("is", "has", "ist", "hat"), ("are", "have", "sind", "haben"))
_COMPOSED = 8000


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

    def several() -> tuple[str, str]:
        english, german = chance.choice(_MANY.split(", ")).split()
        owner, stem = chance.choice([("the", "die"), ("my", "meine"), ("your", "deine")])
        return f"{owner} {english}", f"{stem} {german}"

    def somebody() -> tuple[int, tuple[str, str]]:
        """A subject: which of `_FORMS` it has, and what it is called."""
        one = (("he", "er"), ("she", "sie"), noun(_PERSONS), noun(_PERSONS), noun(_ANIMALS))
        form = chance.choice([0, 1, 1, 1, 2])
        return form, chance.choice([(("I", "ich"),), one, (("we", "wir"), ("they", "sie"), several())][form])

    for _ in range(_COMPOSED):
        form, (who, wer) = somebody()
        be, have, bin_, habe = _FORMS[form]
        what, was = noun(_OBJECTS)
        many, viele = several()
        whom, wen = noun(f"{_OBJECTS}, {_ANIMALS}", "accusative")
        where, wo = pick(_PLACES)
        way, wohin = pick(_WAYS)
        state, zustand = pick(_OF_THE_LIVING)
        look, aussehen = pick(_OF_THINGS)
        plain, forms = pick(_MODALS)
        third, *modals = forms.split()
        modal = (third if form == 1 else plain).replace("-", " ")
        deed, tat = pick(_DEEDS)
        staying, *stays = chance.choice(_BEING.split(", ")).split()
        doing, done, *does, getan = (word.replace("-", " ") for word in chance.choice(_DOING.split(", ")).split())
        # "ich kaufe", "er kauft", "wir kaufen"
        bleibt, tut, geht = ((verb[1][:-1], *verb)[form] for verb in (stays, does, ["geht", "gehen"]))
        english, german = chance.choice(
            [
                (f"{what} is {look}.", f"{was} ist {aussehen}."),
                (f"{many} are {look}.", f"{viele} sind {aussehen}."),
                (f"{what} is too {look}.", f"{was} ist zu {aussehen}."),
                (f"{who} {be} {state}.", f"{wer} {bin_} {zustand}."),
                (f"is {what} {look}?", f"ist {was} {aussehen}?"),
                (f"where is {what}?", f"wo ist {was}?"),
                (f"{what} is {where}.", f"{was} ist {wo}."),
                (f"{who} {be} {staying} {where}.", f"{wer} {bleibt} {wo}."),
                (f"{who} {be} {doing} {whom}.", f"{wer} {tut} {wen}."),
                (f"{who} {have} {done} {whom}.", f"{wer} {habe} {wen} {getan}."),
                (f"{who} {be} going {way}.", f"{wer} {geht} {wohin}."),
                (f"{who} {modal} {deed}.", f"{wer} {modals[form]} {tat}."),
                (f"{who} {have} {whom}.", f"{wer} {habe} {wen}."),
                (f"do you have {whom}?", f"hast du {wen}?"),
                (f"do you see {whom}?", f"siehst du {wen}?"),
                (f"I would like {whom}.", f"ich möchte {wen}."),
            ]
        )
        yield english[0].upper() + english[1:], german[0].upper() + german[1:]
