"""The words of `bank-demo`: intents, names, dialects and frames."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Intent:
    """`clauses` state it (first person, no full stop); `topics` name it as a noun phrase."""

    name: str
    text: str
    sister: str
    clauses: tuple[str, ...]
    topics: tuple[str, ...]


INTENTS = (
    Intent(
        "lost_card",
        "lost card",
        "stolen_card",
        (
            "I [can't find|have misplaced|seem to have lost] my {card}",
            "I [have been looking|was looking] for my {card} since {day} and it hasn't turned up",
            "my {card} must have [slipped|fallen] out of my [pocket|bag|coat] {place}",
            "I [left|think I left] my {card} {place} and when I went back they didn't have it",
            "I have turned the [house|car|office] upside down and there is no sign of my {card}",
            "I put my {card} somewhere safe [before the holidays|when we moved] and can't remember where",
            "I [dropped|mislaid] my {card} {place} [around {time}|{day}]",
            "the {card} was in my jeans {day} and I haven't been able to put my hands on it since",
            "it was careless of me but the {card} [has gone astray|has vanished from my desk]",
        ),
        ("a lost card", "a {card} I had mislaid", "my missing {card}", "the card I couldn't find"),
    ),
    Intent(
        "stolen_card",
        "stolen card",
        "lost_card",
        (
            "someone [took|lifted|pinched] my {card} {place}",
            "my [bag|wallet|purse] was [snatched|grabbed] {place} and the {card} was in it",
            "a [man|kid|stranger] on a [scooter|bike] got away with my wallet and with it the {card}",
            "I was [robbed|pickpocketed|mugged] {place} {day} and they have my {card}",
            "somebody broke into my [car|{home}|locker] {day} and the {card} is gone",
            "my [ex|flatmate|nephew] walked off with my {card} and won't hand it back",
            "there was a hand in my bag {place} and now I'm without my {card}",
            "the {card} [disappeared|went] together with my [jacket|{phone}] while a stranger distracted me",
            "I had to file a police report {day} and my {card} is on the list",
        ),
        ("a stolen card", "a {card} that was taken", "the theft of my {card}", "the robbery"),
    ),
    Intent(
        "transfer_pending",
        "transfer still pending",
        "transfer_failed",
        (
            "my {transfer} to {person} [has been|is] [on its way|processing|pending] since {day}",
            "I sent {amount} to {person} {day} and it hasn't [arrived|landed|shown up] yet",
            "{person} is still waiting for the {amount} that I sent {day}",
            "the {transfer} [left|went out of] my {account} {day} but hasn't reached {person}",
            "it has been {number} days and my {transfer} has not got to {person}",
            "the {app} keeps saying in progress for the {amount} to {person}",
            "I'd like to know how long a {transfer} usually takes as {person} has seen nothing so far",
            "{person} keeps asking me where the {amount} is and all I see is the little clock next to it",
        ),
        ("a slow {transfer}", "a {transfer} that took ages", "a pending {transfer}", "a delayed payment"),
    ),
    Intent(
        "transfer_failed",
        "transfer failed",
        "transfer_pending",
        (
            "my {transfer} to {person} was [rejected|refused|returned|cancelled] {day}",
            "I tried to send {amount} to {person} and it [bounced|came back|did not go through]",
            "the {amount} for {person} is back in my {account} again",
            "every {transfer} that I [start|try] ends with a red cross",
            "the {app} says it could not complete the {amount} to {person}",
            "whenever I send {person} {amount} I get an error and the money stays put",
            "{person} won't be getting the {amount} as the {transfer} was turned down",
            "the {transfer} that I set up {day} was declined after {number} hours",
        ),
        ("a failed {transfer}", "a {transfer} that bounced", "a returned payment", "a rejected {transfer}"),
    ),
    Intent(
        "unknown_charge",
        "charge not recognised",
        "duplicate_charge",
        (
            "there is a [charge|payment] of {amount} from {shop} that I [don't recognise|never made]",
            "I have never [been to|bought from|heard of] {shop} and yet {amount} went out {day}",
            "who is {shop} and why did they take {amount} from my {account}",
            "{amount} went to {shop} {day} while I was asleep",
            "my {statement} lists {shop} for {amount} and that wasn't me",
            "I see {amount} for {shop} on my {card} and nobody in the family knows what it is",
            "I don't know what the {amount} taken {day} is for",
            "something called {shop} shows up on my {statement} at {amount} and it rings no bell",
        ),
        ("a charge I didn't recognise", "a mystery payment to {shop}", "an unknown payment of {amount}"),
    ),
    Intent(
        "duplicate_charge",
        "charged twice",
        "unknown_charge",
        (
            "{shop} [charged|billed] me {amount} twice",
            "I [paid|bought something] at {shop} once and {amount} went out two times",
            "there are two [identical lines|entries] of {amount} from {shop} on my {statement}",
            "the {terminal} at {shop} [froze|lost its connection] so I tapped again and paid double",
            "my {card} was debited {amount} {day} and the same again a minute later at {shop}",
            "I bought one thing at {shop} but my {statement} thinks I bought a pair",
            "{shop} took {amount} {day} and then helped themselves to another {amount}",
            "one of the two payments of {amount} to {shop} should not be there",
        ),
        ("a double charge", "being billed twice by {shop}", "a payment that went out twice"),
    ),
    Intent(
        "login_problem",
        "cannot log in",
        "identity_check",
        (
            "I [can't|am unable to] [log in|sign in] to the {app}",
            "the {app} [doesn't accept|rejects|won't take] my [password|passcode|PIN]",
            "I have forgotten my [password|passcode] for the {app}",
            "I'm locked out of the {app} after {number} attempts",
            "the {app} throws me back to the start screen as soon as I enter my [password|code]",
            "since I got a new {phone} I can't get into the {app}",
            "my [password|passcode] worked {day} and now the {app} says it is wrong",
            "I just see a spinning wheel after typing my [password|user name]",
            "my fingerprint no longer opens the {app}",
        ),
        ("a login problem", "being locked out of the {app}", "a forgotten password", "trouble signing in"),
    ),
    Intent(
        "identity_check",
        "identity check",
        "login_problem",
        (
            "the {app} [wants|asks for] [a photo of my passport|a selfie|proof of address] {again}",
            "you [rejected|didn't accept] my [passport|driving licence|selfie] {day}",
            "I uploaded my [passport|ID|{bill}] {day} and my {account} is still not verified",
            "the camera in the {app} [can't read|won't recognise] my [passport|ID card]",
            "I don't have a [passport|driving licence] and want to know which document you would take",
            "I was told that my {account} is restricted until I prove who I am",
            "my name on the [passport|ID] is spelt differently and you [turned it down|sent it back]",
            "the [video call|selfie step] to confirm that I am really me [dropped|failed] {number} times",
            "I want to know why you need my [{bill}|passport] when I've been a customer for {number} years",
        ),
        ("the identity check", "verifying my ID", "my passport photo", "proving who I am"),
    ),
    Intent(
        "loan_request",
        "asking for a loan",
        "loan_repayment",
        (
            "I would like to borrow {amount} for [a car|a kitchen|my studies|{purpose}]",
            "I want to know [what rate I'd pay|whether I qualify] for a loan of {amount}",
            "we are [planning|thinking of] {purpose} and are about {amount} short",
            "I [applied for|asked about] {amount} {day} and want to know if you will lend it to me",
            "I'd like to know how much you could lend me with my [salary|income|pension]",
            "{purpose} is going to cost {amount} and I can't pay it all at once",
            "I need [financing|credit] of {amount} over {number} years",
            "I'm after the paperwork to get {amount} from you for {purpose}",
        ),
        ("a new loan", "borrowing {amount}", "a loan application", "financing {purpose}"),
    ),
    Intent(
        "loan_repayment",
        "loan repayment",
        "loan_request",
        (
            "I want to [pay off|clear|settle] [my loan|what I owe you] early",
            "I [can't|won't be able to] make this month's [instalment|loan payment]",
            "I would like to move the date of my [instalment|loan payment] to the {number}th",
            "I'd like to lower what I pay back each month on the {amount} you lent me",
            "I want to know how much is left on the loan for {purpose}",
            "could we stretch what I still owe you over {number} more years",
            "I came into {amount} and would rather use it to shrink my debt with you",
            "my hours were cut and the monthly {amount} to you is more than I can manage",
            "the loan [payment|instalment] for {month} went out too early",
        ),
        ("my loan instalments", "paying back the loan", "my repayment plan", "what I owe on the loan"),
    ),
    Intent(
        "close_account",
        "close the account",
        "change_plan",
        (
            "I want to close my {account}",
            "please [shut down|cancel|terminate] my {account} [by the end of {month}|as soon as possible]",
            "I'm [moving to|going with] another bank and won't need the {account} any longer",
            "I no longer [want|need] an account with {brand}",
            "I'd like to know what I have to do to leave {brand}",
            "I would like the {amount} that is left paid out and the {account} gone",
            "my {relative} has died and the {account} has to be wound up",
            "I've had enough of the {account} and want out altogether",
            "I want to know [if there is a notice period|how long it takes] to leave {brand} for good",
        ),
        ("closing my {account}", "leaving {brand}", "the account I closed", "cancelling my {account}"),
    ),
    Intent(
        "change_plan",
        "change account plan",
        "close_account",
        (
            "I want to [switch|move|downgrade|upgrade] my {account} to [another plan|a joint one]",
            "I no longer need the [premium plan|extras] and would like a [free|cheaper] {account}",
            "the monthly fee of the {account} is too high for me and I'd like one of your cheaper ones",
            "I would like to turn my {account} into a joint one with my {relative}",
            "I want to know which of your accounts suits [a student|a pensioner|the self-employed] better",
            "I don't use the insurance that comes with the {account} and want to go one level down",
            "I'd like the version of the {account} that [includes travel cover|pays interest]",
            "I've outgrown the {account} and want to know what the next one up costs",
            "I want to stay with {brand} but stop paying for the premium {account}",
        ),
        (
            "changing my plan",
            "moving to the basic {account}",
            "an upgrade",
            "a cheaper version of the {account}",
        ),
    ),
)

PRODUCTS = (
    "Nimbus", "Drift", "Harbour", "Lumen", "Pebble", "Comet", "Willow", "Anchor", "Swift", "Mosaic",
    "Cobalt", "Juniper", "Relay", "Beacon", "Tandem", "Orbit", "Clover", "Falcon", "Ember", "Lagoon",
    "Summit", "Velvet", "Quill", "Aurora", "Maple", "Sprint", "Onyx", "Coral", "Vista", "Thistle",
    "Zephyr", "Basil", "Saffron", "Ripple", "Granite", "Heron", "Indigo", "Marlin", "Nova", "Tulip",
)  # fmt: skip
"""Names that a bank may give to any of its products: what one means is for the bank's data to say."""

BRANDS = (
    ("North", "West", "Oak", "River", "Stone", "High", "Lake", "Ash", "King", "Fair", "Mill", "Silver"),
    ("gate Bank", "field Savings", "mere", "bridge Trust", "wood Bank", "haven", "port Mutual", "ley & Sons"),
)

GREETINGS = (
    ("Hi,", "Hello,", "Hi there,", "Hey,"),
    ("Dear {brand},", "Dear team,", "Dear sir or madam,", "To whom it may concern:"),
    ("Good morning.", "Good afternoon.", "Good evening.", "Good day."),
    ("Morning all.", "Evening folks.", "Afternoon.", "Right then,"),
    ("Kindly help.", "Respected team,", "Dear friends,", "Hello {brand} team,"),
)

DIALECTS = (
    {
        "phone": ("mobile", "mobile", "phone"),
        "home": ("flat", "house"),
        "statement": ("statement", "bank statement"),
        "bill": ("gas bill", "council tax letter"),
        "currency": ("£",),
        "terminal": ("card machine", "till"),
        "relative": ("mum", "husband", "wife", "dad", "partner"),
    },
    {
        "phone": ("cell phone", "phone", "iPhone"),
        "home": ("apartment", "house"),
        "statement": ("statement", "account activity"),
        "bill": ("utility bill", "lease"),
        "currency": ("$",),
        "terminal": ("card reader", "register"),
        "relative": ("mom", "husband", "wife", "dad", "spouse"),
    },
    {
        "phone": ("phone", "mobile"),
        "home": ("gaff", "house"),
        "statement": ("statement", "transactions list"),
        "bill": ("electricity bill", "broadband bill"),
        "currency": ("€",),
        "terminal": ("card machine", "terminal"),
        "relative": ("mam", "husband", "wife", "da", "partner"),
    },
    {
        "phone": ("handset", "mobile number", "phone"),
        "home": ("flat", "quarters"),
        "statement": ("passbook", "statement"),
        "bill": ("electricity bill", "ration card"),
        "currency": ("Rs ", "₹"),
        "terminal": ("swipe machine", "POS machine"),
        "relative": ("mother", "husband", "wife", "father", "brother"),
    },
)

COMMON = {
    "amount": tuple("{currency}" + a for a in (
        "12.50", "19.99", "35", "40", "58.20", "75", "89", "120", "149.90", "200", "240", "315", "450",
        "600", "780", "950", "1,200", "1,850", "2,500", "3,000", "4,200", "6,000", "8,500", "12,000",
    )),
    "shop": (
        "Blue Fern Cafe", "Dorado Travel", "Pixel Arcade", "Greenway Market", "Hotel Miramar", "TrainLine 24",
        "Bramble Books", "Kitchen & Co", "StreamBox", "Gusto Pizza", "Urban Petrol", "Nordic Outfitters",
        "the pharmacy", "the garage", "a parking app", "QZ Media Ltd", "Fitlane Gym", "Petals Online",
        "Corner Deli", "Cloudshelf", "Taxi Uno", "the bakery round the corner", "SportHaus", "Luma Lighting",
    ),
    "day": (
        "yesterday", "on Monday", "on Tuesday", "on Wednesday", "on Thursday", "on Friday", "last night",
        "last weekend", "this morning", "two days ago", "a week ago", "on the 3rd", "on the 14th",
        "on the 28th",
    ),
    "time": ("noon", "8 in the morning", "half past six", "lunchtime",
        "midnight", "4 pm", "a quarter to nine"),
    "month": ("January", "March", "April", "June", "August", "September", "November", "December"),
    "number": ("two", "three", "four", "five", "six", "seven", "ten"),
    "place": (
        "on the tram", "at the airport", "in a taxi", "at the gym", "on the beach", "at a petrol station",
        "in the supermarket", "at a concert", "in a restaurant", "on the night train", "at the swimming pool",
        "near the station", "at work", "in the park", "in a changing room",
    ),
    "person": (
        "my landlord", "my sister", "Anna", "Mr Okafor", "my daughter", "the plumber", "Tomasz", "my brother",
        "our supplier", "Priya", "the school", "my old flatmate", "Grandma", "the dentist", "Leila",
        "my boss",
    ),
    "purpose": (
        "a new roof", "the wedding", "a second-hand van", "the extension", "my daughter's degree",
        "a heat pump",
        "dental work", "the move", "a new bathroom", "our honeymoon", "solar panels", "a small workshop",
    ),
    "again": ("again", "for the third time", "all of a sudden", "out of the blue"),
}  # fmt: skip

ASIDES = (
    "I have been with {brand} for {number} years.",
    "I'm [abroad|on the road|at my {relative}'s] until {month}.",
    "The chat in the {app} [wasn't much help|sent me in circles].",
    "I waited {number} minutes on the phone {day}.",
    "My {relative} told me to write to you.",
    "I mainly use the {card} for [groceries|travel|the kids] and the {account} for bills.",
    "I pay {person} by {transfer} every month.",
    "Writing this from my {phone}.",
    "I'm not very good with the {app}.",
    "I usually shop at {shop}.",
    "I took out a loan with you years ago and was always happy.",
    "My {relative} has the same {card}.",
    "Sorry to bother you.",
)

CLOSINGS = (
    "What [can|should] I do [now|next]?", "Can [you|someone] help?", "Please advise.", "Thanks.",
    "Many thanks in advance.", "Please get back to me [today|soon|by {month}].", "How do we go on from here?",
    "Call me on my {phone} if you need more.", "I'm getting rather [worried|annoyed|tired of this].",
    "Regards", "Please explain.", "I look forward to your reply.", "Could you look into it?", "Cheers.",
)  # fmt: skip

DISTRACTIONS = (
    "I wrote to you {day} because <story>; that is settled. [Today|This time] it's something else: <core>.",
    "This is not about <topic>, which you have already [sorted|dealt with]. <Core>.",
    "<Core>. It has nothing to do with <topic>, that case is closed.",
    "Your colleague thought I was calling about <topic>, but no: <core>.",
    "<Core>. Once that is out of the way I may ask about <topic>, but not today.",
    "Your last e-mail was about <topic>. That was never my question. What I said is that <core>.",
    "My {relative} is the one with <topic> and will write separately; in my case <core>.",
    "Please ignore my message about <topic>. What matters is that <core>.",
    "<Core>. Please don't send me the leaflet about <topic> again.",
    "Don't file this under <topic> like last time. <Core>.",
    "You solved it quickly when I told you that <story>. I hope it goes as well now that <core>.",
    "<Core>. I only mention it as the {app} offers me help with <topic> and nothing else.",
)
"""Frames for a main intent (`<core>`) beside another one (`<topic>`, `<story>`), told apart by grammar."""
