"""Questions of benchmarks that are made here: as in `data.tasks`, each depends on its number alone, on any machine.

passkey: a number that stands somewhere among words is asked for, for how far back a model can look. colours, shapes:
what a drawn picture shows. tool-calls: a request to which the answer is a call of one of three functions. translation:
a word in another language.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from PIL import Image, ImageDraw

from ministral_jax.data.conversation import Document, Message, parse_tools
from ministral_jax.data.tasks import WORDS
from ministral_jax.files import stable_key

T = TypeVar("T")
SIDE = 112
"""Of a picture, in pixels."""
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (250, 220, 40),
    "black": (0, 0, 0),
    "pink": (250, 150, 190),
}
SHAPES = ("circle", "square", "triangle", "cross")
_NAMES = ("Anna", "Ben", "Chloe", "David", "Emma", "Felix")
_CITIES = ("Paris", "Rome", "Oslo", "Lima", "Cairo", "Delhi", "Tokyo", "Accra")
_LANGUAGES = ("French", "German", "Spanish", "Italian")
_LEXICON = """
dog chien Hund perro cane
cat chat Katze gato gatto
water eau Wasser agua acqua
bread pain Brot pan pane
house maison Haus casa casa
book livre Buch libro libro
sun soleil Sonne sol sole
moon lune Mond luna luna
fish poisson Fisch pez pesce
milk lait Milch leche latte
tree arbre Baum árbol albero
hand main Hand mano mano
fire feu Feuer fuego fuoco
star étoile Stern estrella stella
night nuit Nacht noche notte
king roi König rey re
horse cheval Pferd caballo cavallo
window fenêtre Fenster ventana finestra
"""
"""English, and the word in each of the languages."""


def passkeys(count: int, words: int) -> Iterator[Document]:
    """Among 1 to `words` words, as many from 2^k to 2^(k+1) for every k; columns `words` and `depth`, those before."""
    for n in range(count):
        low = 1 << _draw(f"passkey octave {n}", range(words.bit_length()))
        length = low + _draw(f"passkey length {n}", range(min(low, words + 1 - low)))
        hay = [_draw(f"passkey {n} word {i}", WORDS) for i in range(length)]
        depth = _draw(f"passkey depth {n}", range(length + 1))
        key = str(10000 + _draw(f"passkey {n}", range(90000)))
        text = " ".join([*hay[:depth], f"The key is {key}.", *hay[depth:], "What is the key?"])
        yield _question("passkey", n, (text,), key, words=length, depth=depth)


def colours(count: int) -> Iterator[Document]:
    """Column `choices`: what it may be."""
    for n in range(count):
        colour, picture = _drawn(n)[1:]
        question = "What colour is the shape? Answer with one word."
        yield _question("colours", n, (picture, question), colour, choices=[*COLOURS])


def shapes(count: int) -> Iterator[Document]:
    """Column `choices`: what it may be."""
    for n in range(count):
        shape, _, picture = _drawn(n)
        yield _question("shapes", n, (picture, "Which shape is this? Answer with one word."), shape, choices=[*SHAPES])


def tool_calls(count: int) -> Iterator[Document]:
    """Columns `name` and `arguments` of the one right call."""
    for n in range(count):
        a, b = (_draw(f"tool-calls {n} {side}", range(10, 100)) for side in "ab")
        who, city = _draw(f"tool-calls {n} name", _NAMES), _draw(f"tool-calls {n} city", _CITIES)
        text, name, arguments = _draw(
            f"tool-calls {n}",
            (
                (f"What is the weather in {city}?", "get_weather", {"city": city}),
                (f"Use a tool to multiply {a} by {b}.", "multiply", {"a": a, "b": b}),
                (f"Send the message 'hello' to {who}.", "send_message", {"to": who, "text": "hello"}),
            ),
        )
        yield _question("tool-calls", n, (text,), "", _TOOLS, name=name, arguments=arguments)


def translations(count: int) -> Iterator[Document]:
    """All there are, or the first `count`."""
    rows = [line.split() for line in _LEXICON.strip().splitlines()]
    pairs = [(row[0], language, word) for row in rows for language, word in zip(_LANGUAGES, row[1:], strict=True)]
    for n, (english, language, word) in enumerate(pairs[:count]):
        text = f"Translate into {language}, with one word and no article: {english}"
        yield _question("translation", n, (text,), word, language=language)


def _question(
    kind: str, n: int, parts: tuple[Any, ...], answer: str, tools: tuple[dict[str, Any], ...] = (), **columns: Any
) -> Document:
    name = f"{kind}-{n:05d}"
    messages = Message("user", parts), Message("assistant", (answer,))
    return Document(name, name, messages=messages, tools=tools, columns={"answer": answer, **columns})


def _draw(name: str, options: Sequence[T]) -> T:
    """What a name always draws."""
    return options[stable_key(name) % len(options)]


def _drawn(n: int) -> tuple[str, str, Image.Image]:
    """Shape, colour and picture."""
    shape, colour = _draw(f"shape {n}", SHAPES), _draw(f"colour {n}", [*COLOURS])
    half = SIDE // 5 + _draw(f"size {n}", range(SIDE // 8))
    x, y = (half + 4 + _draw(f"{axis} {n}", range(SIDE - 2 * half - 8)) for axis in "xy")
    image = Image.new("RGB", (SIDE, SIDE), "white")
    pen, box, ink = ImageDraw.Draw(image), (x - half, y - half, x + half, y + half), COLOURS[colour]
    match shape:
        case "circle":
            pen.ellipse(box, fill=ink)
        case "square":
            pen.rectangle(box, fill=ink)
        case "triangle":
            pen.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=ink)
        case _:
            pen.line([(x - half, y), (x + half, y)], fill=ink, width=half // 2)
            pen.line([(x, y - half), (x, y + half)], fill=ink, width=half // 2)
    return shape, colour, image


def _tool(name: str, description: str, **kinds: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in kinds.items()}
    parameters = {"type": "object", "properties": properties, "required": [*kinds]}
    return {"type": "function", "function": dict(name=name, description=description, parameters=parameters)}


_TOOLS = parse_tools(
    [
        _tool("get_weather", "The weather in a city.", city="string"),
        _tool("multiply", "The product of two whole numbers.", a="integer", b="integer"),
        _tool("send_message", "Send a text to a person.", to="string", text="string"),
    ],
    "tool-calls",
)
