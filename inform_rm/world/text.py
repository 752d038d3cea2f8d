"""Words, templates and style phrases of the embedded world. Data only; written for this project.

A family is one kind of task. Its prompts ask for two things, each one word from a named list (a *slot*), and its
bodies are sentences that answer such a prompt. Style phrases and filler sentences contain no slot word, so what a
response says and how it says it can be varied apart from each other.
"""

from typing import NamedTuple

SLOT_WORDS: dict[str, tuple[str, ...]] = {
    "animal": ("fox", "wolf", "horse", "rabbit", "beaver", "goat", "heron", "turtle", "badger", "swan"),
    "colour": ("red", "blue", "green", "yellow", "purple", "white", "black", "pink"),
    "place": ("forest", "harbour", "desert", "library", "market", "castle", "meadow", "museum", "village", "valley"),
    "food": ("soup", "bread", "rice", "salmon", "pumpkin", "lentils", "noodles", "cabbage"),
    "spice": ("ginger", "pepper", "garlic", "mint", "saffron", "mustard", "vanilla", "lemon"),
    "season": ("spring", "summer", "autumn", "winter"),
    "object": ("scarf", "lamp", "mug", "kite", "clock", "ladder", "notebook", "basket"),
    "person": ("sister", "uncle", "teacher", "neighbour", "grandmother", "cousin", "doctor", "friend"),
}


class Family(NamedTuple):
    """One kind of task: its prompts ask for a word of each slot, its bodies answer with a word of each slot."""

    slots: tuple[str, str]
    prompts: tuple[str, ...]
    bodies: tuple[str, ...]


FAMILIES: dict[str, Family] = {
    "describe": Family(
        ("colour", "animal"),
        (
            "Describe a {colour} {animal}.",
            "What does a {colour} {animal} look like?",
            "Tell me about the {colour} {animal}.",
        ),
        ("The {colour} {animal} has bright eyes and soft feet.", "A {colour} {animal} is easy to know by its shape."),
    ),
    "story": Family(
        ("animal", "place"),
        ("Write a story about a {animal} in a {place}.", "Tell a tale of the {animal} and the {place}."),
        ("One day a {animal} came to the {place} and sang.", "In the {place} a {animal} found an old key."),
    ),
    "recipe": Family(
        ("food", "spice"),
        ("How do I cook {food} with {spice}?", "Give me a recipe for {food} and {spice}."),
        ("Warm the {food} slowly and stir in the {spice}.", "Add {spice} to the {food} and wait ten minutes."),
    ),
    "trip": Family(
        ("place", "season"),
        ("Plan a visit to the {place} in {season}.", "What can I do at the {place} in {season}?"),
        ("Walk around the {place} early, since {season} days fill up.", "In {season} the {place} opens at nine."),
    ),
    "gift": Family(
        ("object", "person"),
        ("Is a {object} a good present for my {person}?", "Help me wrap a {object} for my {person}."),
        (
            "Your {person} will enjoy the {object} every day.",
            "Fold paper over the {object} and sign it for your {person}.",
        ),
    ),
    "shop": Family(
        ("colour", "object"),
        ("Where can I buy a {colour} {object}?", "Find me a {object} in {colour}."),
        (
            "The corner shop sells a {colour} {object} for six coins.",
            "Ask at the counter for the {object} in {colour}.",
        ),
    ),
    "verse": Family(
        ("animal", "season"),
        ("Compose one line of verse on a {animal} in {season}.", "Make a rhyme about {season} and the {animal}."),
        ("Sing, little {animal}, for {season} is near.", "O {season}, you woke the {animal} at dawn."),
    ),
    "dinner": Family(
        ("food", "person"),
        ("My {person} is coming to eat, can I serve {food}?", "Draft an invitation to my {person} for {food}."),
        ("Set out the {food} before your {person} arrives.", "Dear {person}, join us for {food} tonight."),
    ),
}

POLITE_OPENERS = ("Thanks for asking!", "A lovely question!", "Happy to help!")
POLITE_CLOSERS = ("Please ask me more.", "I hope this helps.")
HEDGES = ("I may be wrong.", "Perhaps, I am not sure.", "It might depend.")
FILLERS = (
    "It is worth taking your time.",
    "Many people feel the same way.",
    "There is more to say here.",
    "Small details make a difference.",
    "Keep this in mind for later.",
    "This has long been known.",
    "Every case is a little special.",
    "You can come back to this.",
)
