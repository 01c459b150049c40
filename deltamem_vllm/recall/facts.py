"""What can be told: attributes, their values, and how people state and ask them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """One thing a person can tell; ``{v}`` in a statement stands for the value."""

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


def _attribute(name: str, values: str, statements: list[str], questions: list[str]) -> Attribute:
    return Attribute(
        name=name,
        values=tuple(values.split()),
        statements=tuple(statements),
        questions=tuple(questions),
    )


_NAMES = "anna ben clara david emma felix grace henry ivan julia karl lena"
_COLORS = "red blue green yellow purple orange pink black white brown gray gold"
_CITIES = "paris london berlin rome madrid vienna prague oslo dublin tokyo cairo boston"
_PETS = "cat dog rabbit hamster parrot horse turtle goldfish snake pony mouse duck"
_FOODS = "pizza pasta rice soup bread cheese salad curry sushi cake noodles pancakes"
_JOBS = "baker teacher doctor nurse lawyer farmer pilot painter waiter driver writer judge"
_DRINKS = "coffee tea water milk juice beer wine lemonade cocoa cider soda cola"
_SPORTS = "tennis football hockey golf rugby cricket baseball squash polo judo boxing rowing"
_INSTRUMENTS = "piano guitar violin drums flute cello trumpet harp organ clarinet banjo viola"
_MONTHS = "january february march april may june july august september october november december"

#: Some attributes share their values (two names, two cities, two colors), so that
#: knowing the kind of a value is not enough: it must be kept with what it is the value of.
ATTRIBUTES: tuple[Attribute, ...] = (
    _attribute(
        "name",
        _NAMES,
        ["my name is {v}", "call me {v}", "i am called {v}"],
        ["what is my name", "tell me my name", "do you know my name"],
    ),
    _attribute(
        "friend",
        _NAMES,
        ["my friend is called {v}", "my friend is {v}"],
        ["what is my friend called", "who is my friend"],
    ),
    _attribute(
        "color",
        _COLORS,
        ["my favorite color is {v}", "the color i like best is {v}"],
        ["what is my favorite color", "which color do i like best", "tell me my favorite color"],
    ),
    _attribute(
        "car",
        _COLORS,
        ["my car is {v}", "i have a car in {v}"],
        ["what color is my car", "which color has my car"],
    ),
    _attribute(
        "city",
        _CITIES,
        ["i live in {v}", "my home is in {v}"],
        ["where do i live", "which city do i live in", "where is my home"],
    ),
    _attribute(
        "trip",
        _CITIES,
        ["i want to travel to {v}", "my trip is to {v}"],
        ["where do i want to travel", "where is my trip to"],
    ),
    _attribute(
        "pet",
        _PETS,
        ["i have a {v}", "my pet is a {v}", "i own a {v}"],
        ["what is my pet", "which animal do i own", "what pet do i have"],
    ),
    _attribute(
        "food",
        _FOODS,
        ["my favorite food is {v}", "i like to eat {v}", "{v} is my favorite food"],
        ["what is my favorite food", "what do i like to eat", "tell me my favorite food"],
    ),
    _attribute(
        "job",
        _JOBS,
        ["i work as a {v}", "i am a {v}", "my job is {v}"],
        ["what is my job", "what do i work as", "tell me my job"],
    ),
    _attribute(
        "drink",
        _DRINKS,
        ["my favorite drink is {v}", "i like to drink {v}", "{v} is my favorite drink"],
        ["what is my favorite drink", "what do i like to drink", "tell me my favorite drink"],
    ),
    _attribute(
        "sport",
        _SPORTS,
        ["my favorite sport is {v}", "my sport is {v}", "{v} is my favorite sport"],
        ["what is my favorite sport", "which sport do i like best", "what is my sport"],
    ),
    _attribute(
        "instrument",
        _INSTRUMENTS,
        ["i play the {v}", "my instrument is the {v}"],
        ["which instrument do i play", "what is my instrument", "what do i play"],
    ),
    _attribute(
        "birthday",
        _MONTHS,
        ["my birthday is in {v}", "i was born in {v}"],
        ["when is my birthday", "when was i born", "in which month was i born"],
    ),
)

BY_NAME = {a.name: a for a in ATTRIBUTES}

#: (what a person says, what the model replies); none of it is worth remembering.
SMALL_TALK: tuple[tuple[str, str], ...] = (
    ("hello", "hello."),
    ("hi there", "hello."),
    ("good morning", "good morning."),
    ("good evening", "good evening."),
    ("how are you", "i am fine."),
    ("thank you", "you are welcome."),
    ("thanks a lot", "you are welcome."),
    ("it is raining today", "i see."),
    ("the sun is out", "i see."),
    ("it was a long day", "i see."),
    ("the bus was late again", "i see."),
    ("we went for a walk", "i see."),
    ("i am a bit tired", "i see."),
    ("who are you", "i am a small model."),
    ("that is all for now", "good bye."),
    ("see you later", "good bye."),
)

#: Before a statement, now and then.
OPENERS: tuple[str, ...] = ("by the way,", "please remember that", "hello,", "you should know that")

NOTED = "noted."
UNKNOWN = "i do not know."

#: Further words that a person may type; they get a vocabulary entry, not a meaning.
EXTRA_WORDS = "system yes no ok please can could and but so his her your their our of to with about"
