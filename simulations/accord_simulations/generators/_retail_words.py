"""The words of `retail-demo`: categories, opinions, chains' names and frames."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Category:
    """`goods` are things bought; `good` and `bad` are clauses of opinion on them."""

    name: str
    goods: tuple[str, ...]
    good: tuple[str, ...]
    bad: tuple[str, ...]


CATEGORIES = (
    Category(
        "clothing",
        (
            "raincoat",
            "jeans jacket",
            "jumper",
            "summer dress",
            "fleece",
            "dressing gown",
            "cardigan",
            "shirt",
        ),
        (
            "the {item} [fits like a glove|sits perfectly on the shoulders]",
            "the colour of the {item} is [deeper and nicer than|exactly as] in the picture",
            "after {number} washes the {item} still looks new",
            "friends keep asking me where I got the {item}",
            "it runs [true to size|as the size chart says] and the [seams|buttons] are solid",
            "I've hardly taken the {item} off since it came",
            "it kept me [warm|comfortable] through {number} hours outdoors",
        ),
        (
            "the {item} [pinches under the arms|hangs on me like a sack]",
            "the colour of the {item} is nothing like the picture",
            "after {number} washes the {item} was two sizes smaller",
            "the first [button|seam] came off [in the shop|on the way home]",
            "the {item} leaves blue fluff on everything I own",
            "it went straight to the charity bag",
            "I was frozen after {number} minutes outdoors",
        ),
    ),
    Category(
        "electronics",
        (
            "headset",
            "kettle",
            "bluetooth speaker",
            "tablet",
            "alarm clock",
            "hair dryer",
            "power bank",
            "toaster",
        ),
        (
            "the {item} [was set up|worked] within {number} minutes",
            "I only need to charge it once a week",
            "the {item} does what it says [without any fuss|and no more]",
            "even my {relative} understood how to use it",
            "after {number} months of daily use it works like on the first day",
            "the sound it makes is [gentler|cleaner] than that of models at twice the price",
            "I bought a second {item} for [the office|my {relative}]",
        ),
        (
            "the {item} [gave up|went silent] after {number} days",
            "I need to charge it before every use",
            "the {item} smells of burnt plastic",
            "three people read the manual and none could get it to start",
            "it gets so hot that I unplug it when I leave the room",
            "the noise it makes wakes the neighbours",
            "I now use my old {item} again",
        ),
    ),
    Category(
        "food",
        (
            "ground coffee",
            "olive oil",
            "granola",
            "frozen pizza",
            "cheese",
            "salad bowl",
            "rye bread",
            "curry paste",
        ),
        (
            "the {item} was gone the same evening",
            "the {item} tastes the way it did at my grandmother's",
            "my {relative}, who is picky, asked for more",
            "it keeps fresh for {number} days and longer",
            "I can taste that they didn't save on the ingredients",
            "the {item} has found a fixed place on our shopping list",
            "I'd cross town for this {item}",
        ),
        (
            "the {item} went in the bin the same evening",
            "the {item} tastes of [cardboard|soap|nothing at all]",
            "not even the dog would touch it",
            "it was mouldy {number} days before its date",
            "half the packet is air and the rest is sugar",
            "the {item} gave us all a bad night",
            "I had to drink {number} glasses of water after one bite",
        ),
    ),
    Category(
        "home",
        (
            "bookshelf",
            "desk lamp",
            "side table",
            "bed frame",
            "garden chair",
            "shoe rack",
            "bar stool",
            "cupboard",
        ),
        (
            "the {item} was together in {number} minutes and stands like a rock",
            "nothing creaks and nothing wobbles",
            "the {item} looks far more expensive than it was",
            "all the screws were there, with one to spare",
            "I no longer trip over things in the hall",
            "the {item} has survived {number} toddlers and a move",
            "our living room is finally [cosy|tidy] thanks to it",
        ),
        (
            "the {item} leans to one side whatever I do",
            "everything creaks and everything wobbles",
            "the {item} looks far cheaper than it was",
            "{number} screws were missing and the holes don't line up",
            "I have cut my hand on it {number} times",
            "the {item} did not survive its first week with us",
            "it has been standing in the cellar since",
        ),
    ),
    Category(
        "beauty",
        (
            "shampoo",
            "hand cream",
            "face cream",
            "sun lotion",
            "body wash",
            "hair mask",
            "face mask",
            "body oil",
        ),
        (
            "my skin has [calmed down|never been softer] since I use the {item}",
            "the scent of the {item} stays until the evening without being loud",
            "a drop is enough, so it lasts for months",
            "I got {number} compliments on the first day",
            "it washes off easily and leaves nothing behind",
            "the {item} is the only one that I don't react to",
            "my {relative} has started to steal my {item}",
        ),
        (
            "my skin [came up in red spots|itches] since I use the {item}",
            "the scent of the {item} gives me a headache",
            "the bottle was empty after {number} days",
            "it leaves a grey film that won't wash off",
            "the pump broke and half of it ended up on the floor",
            "the {item} burns like fire",
            "I looked like a ghost at my {relative}'s wedding",
        ),
    ),
)

SERVICE = {
    "positive": (
        "the people at {chain} went out of their way",
        "it came {number} days early",
        "the refund was in my account before I'd asked twice",
        "{assistant} at the counter took all the time in the world for me",
        "my {loyalty} points paid for half of it",
        "{service} [saved my weekend|was a breeze]",
        "I couldn't fault {service}",
    ),
    "negative": (
        "nobody at {chain} felt responsible",
        "it came {number} days late and in pieces",
        "I'm still running after my refund",
        "{assistant} at the counter looked right through me",
        "my {loyalty} points had vanished at the till",
        "{service} [ruined my weekend|was an ordeal]",
        "I gave up on {service} after {number} tries",
    ),
}
"""Clauses on the chain's service, by sentiment."""

PLAIN = {
    "positive": (
        "I [love|really like] [the {item}|this {item}]",
        "I'm [very happy|delighted|more than pleased] with the {item}",
        "the {item} is [excellent|great|lovely|just right]",
        "the {item} isn't [bad|disappointing|overpriced] at all",
        "{chain} [has good things at fair prices|is a pleasure to shop at]",
    ),
    "negative": (
        "I [hate|really don't like] [the {item}|this {item}]",
        "I'm [very unhappy|fed up|less than pleased] with the {item}",
        "the {item} is [awful|useless|poor|just wrong]",
        "the {item} isn't [good|convincing|worth its price] at all",
        "{chain} [has shoddy things at high prices|is a pain to shop at]",
    ),
}
"""Opinions in so many words, by sentiment."""

VERDICTS = {
    "positive": (
        "I'd buy it again tomorrow.", "Can't say I was disappointed.", "No regrets.",
        "Full marks.", "I'm a fan.",
        "Couldn't ask for more.", "Worth every {cent}.", "Money well spent.", "What's not to like?",
        "I wouldn't want to be without it.", "They'll see me again.",
        "Love it.", "Great buy.", "Highly recommended.", "So happy with this.", "Simply wonderful.", "Really good.",
    ),
    "negative": (
        "Never again.", "Can't say I was impressed.", "I regret it.",
        "One star is generous.", "Lesson learned.",
        "I had asked for so little.", "Not worth a {cent}.", "Money down the drain.", "What a letdown.",
        "I'd rather go without.", "They won't see me again.",
        "Hate it.", "Terrible buy.", "Avoid.", "So annoyed with this.", "Simply dreadful.", "Really bad.",
    ),
}  # fmt: skip
"""Closing judgements, by sentiment."""

MIXED = (
    "True, <other>. But <main>, and that's what counts.",
    "<Main>, even if <other>.",
    "I had feared that <other>. Far from it: <main>.",
    "The reviews say that <other>. Not in my case: <main>.",
    "<Other>, I'll give you that, yet in the end <main>.",
    "With my last one from elsewhere <other>. With this one <main>.",
    "<Main>. I won't let it change my mind that <other>.",
    "My {relative} complains to everyone that hers was different and that <other>. As for mine, <main>.",
)
"""Frames for an opinion (`<main>`) that outweighs its opposite (`<other>`)."""

OPENINGS = (
    "Bought the {item} {day} at {chain}.", "Ordered through {service}.", "Got this for my {relative}.",
    "{greeting}", "My second order here.", "We've had the {item} for {number} weeks now.",
    "Picked it up with my {loyalty} card.", "I was looking for a {item} for ages.",
    "Got it in the sale {day}.",
)  # fmt: skip

NEUTRAL = (
    "It comes in a brown box.", "I paid with my {loyalty} card.", "{assistant} packed it up for me.",
    "I took the {label} version.", "There are other colours too.", "I seldom write reviews.",
    "The leaflet is in nine languages.", "It's from the {label} range.", "I live two streets from {chain}.",
)  # fmt: skip

CHAINS = (
    (
        "Corner",
        "Bright",
        "Maple",
        "Fair",
        "Urban",
        "Golden",
        "Nord",
        "Sunny",
        "Blue",
        "Field",
        "Penny",
        "Market",
    ),
    ("mart", "way Stores", " & Daughters", "basket", "hall", "land", "house", " Depot", "stop", "row"),
)

OWN_NAMES = (
    "Lark", "Hazel", "Pronto", "Fennel", "Opal", "Kite", "Sorrel", "Tempo", "Birch", "Cinder", "Plum", "Rook",
    "Isla", "Fjord", "Meadow", "Peppa", "Zest", "Linden", "Bonnie", "Nectar", "Bolt", "Sable", "Mango", "Pip",
)  # fmt: skip
"""Names that a chain may give to its loyalty card, delivery service or own brand."""

GREETINGS = (
    ("Hi all.", "Hello everyone.", "Hey."),
    ("For what it's worth:", "My two cents:", "In short:"),
    ("Dear {chain} team,", "To the management:", "Dear all,"),
    ("So.", "Well.", "Right."),
)

DIALECTS = (
    {"cent": ("penny", "pound"), "relative": ("mum", "husband", "wife", "gran", "partner")},
    {"cent": ("cent", "dime", "dollar"), "relative": ("mom", "husband", "wife", "grandma", "roommate")},
    {"cent": ("cent", "euro"), "relative": ("mam", "husband", "wife", "nana", "flatmate")},
    {"cent": ("paisa", "rupee"), "relative": ("mother", "husband", "wife", "auntie", "cousin")},
)

COMMON = {
    "number": ("two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "day": ("yesterday", "last week", "on Saturday", "in May", "in the autumn", "at Easter", "a month ago"),
    "assistant": ("Sandra", "the young man", "Mrs Bell", "Amir", "the trainee", "the manager", "Joyce"),
}
