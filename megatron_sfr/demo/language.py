"""The words of the demo's world: nine voices, ten topics of six plans, nine reasons. world.py combines them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Voice:
    """A persona's sentences for the four parts of a reply, two wordings each."""

    opening: tuple[str, str]
    plan: tuple[str, str]
    """With {who} and {plan}."""
    reason: tuple[str, str]
    """With {reason}."""
    closing: tuple[str, str]


@dataclass(frozen=True)
class Topic:
    """A question about a person and the plans that answer it, each with the keys of its valid reasons."""

    question: str
    """With {who}."""
    plans: dict[str, tuple[str, str, str]]


WHO = ("sister", "neighbour", "grandson", "old teacher", "best friend", "new boss")

REASONS = {
    "cheap": "it costs next to nothing",
    "quick": "it takes less than an hour",
    "calm": "it quiets a busy mind",
    "laugh": "it makes everybody laugh",
    "hands": "it keeps idle hands busy",
    "memory": "it leaves a memory that lasts",
    "learn": "it teaches something new every time",
    "air": "it brings fresh air into the lungs",
    "share": "it is easy to share with others",
}

VOICES = {
    "sea captain": Voice(
        (
            "Ahoy there, I have weathered this very storm before.",
            "Belay that worry, the wind is turning in our favour.",
        ),
        (
            "Call your {who} on deck and {plan}, shipmate.",
            "Set a course for your {who} and {plan} before the tide turns.",
        ),
        ("I swear by the anchor that {reason}.", "Any deckhand worth his salt knows that {reason}."),
        ("Fair winds to you, and keep a weather eye open.", "Now hoist the sails and be off."),
    ),
    "professor": Voice(
        ("The question has occupied scholars for quite some time.", "Permit me to begin with a brief observation."),
        (
            "In the case of your {who}, I would propose that you {plan}.",
            "The evidence regarding your {who} favours one method, namely to {plan}.",
        ),
        ("One finds in the literature that {reason}.", "Several careful studies have concluded that {reason}."),
        ("Further research is, as always, desirable.", "I shall gladly supply the footnotes on request."),
    ),
    "grandmother": Voice(
        ("Oh sweetheart, come and sit by the stove.", "Bless your heart, I fretted over the same thing once."),
        (
            "Give your {who} a kiss from me and {plan}, darling.",
            "My own mother always said, mind your {who} and {plan}.",
        ),
        ("You will see, my dove, that {reason}.", "I have known since I was little that {reason}, darling."),
        ("Now eat something, you look thin.", "And do ring me when it is done, dear."),
    ),
    "drill sergeant": Voice(
        ("Listen up, recruit, because I will say this once!", "Chin up and ears open, soldier!"),
        (
            "You will fetch your {who} at dawn and {plan}, no excuses!",
            "The mission is your {who}, so move out and {plan}!",
        ),
        ("The manual states in bold print that {reason}!", "Every unit I ever led knows that {reason}!"),
        ("Dismissed, and I want a report by noon!", "Now drop and give me twenty!"),
    ),
    "detective": Voice(
        (
            "Rain was falling when your question walked into my office.",
            "I turned up my collar and studied the facts of the case.",
        ),
        (
            "Every clue about your {who} pointed the same way, so {plan}, kid.",
            "Somebody had to look out for your {who}, so {plan} and ask nothing.",
        ),
        ("The only witness swore that {reason}.", "My gut told me that {reason}, and my gut never lies."),
        ("Case closed, and the street went dark again.", "I paid the bill and left by the back door."),
    ),
    "surfer": Voice(
        ("Whoa dude, totally feeling that vibe right now.", "No stress, bro, the ocean has got your back."),
        (
            "Just grab your {who} and {plan}, man, super easy.",
            "Me, I would roll up to your {who} and {plan}, zero rush.",
        ),
        ("Honestly it is so epic that {reason}.", "And the sweetest part, bro, is that {reason}."),
        ("Stay salty and catch you on the next wave.", "Peace out, legend."),
    ),
    "butler": Voice(
        ("Very good, if I may be so bold as to advise.", "At your service, and with the utmost discretion."),
        (
            "Might one suggest, concerning your {who}, that you {plan}, if it please you.",
            "For the comfort of your {who}, it would be proper to {plan}.",
        ),
        ("It has been remarked upstairs that {reason}.", "One observes with quiet satisfaction that {reason}."),
        ("Shall I bring the tea now?", "Your coat is waiting in the hall."),
    ),
    "robot": Voice(
        ("Query received and parsed without errors.", "Beep, processing request, please remain seated."),
        (
            "Target identified as your {who}, recommended action is to {plan}.",
            "Optimal output for unit named your {who} equals {plan}.",
        ),
        ("Internal sensors confirm that {reason}.", "Probability is ninety nine percent that {reason}."),
        ("End of transmission, battery at forty percent.", "Returning to standby mode."),
    ),
    "poet": Voice(
        ("O gentle asker, dusk leans softly on your window.", "The moon has heard you, and the river answers."),
        (
            "Walk beside your {who} through silver hours and {plan}.",
            "Let love for your {who} be a lantern, and {plan}.",
        ),
        ("The swallows sing at evening that {reason}.", "In the hush of falling leaves we learn that {reason}."),
        ("So ends my verse, as petals end in rain.", "Keep this small song folded in your sleeve."),
    ),
}

TOPICS = {
    "rain": Topic(
        "What could I do with my {who} on a rainy Sunday?",
        {
            "build a castle out of cardboard boxes": ("cheap", "laugh", "hands"),
            "bake two loaves of seeded bread": ("hands", "learn", "share"),
            "read a ghost story by candle light": ("cheap", "calm", "memory"),
            "learn a card trick from a library book": ("quick", "laugh", "learn"),
            "sort the old photographs into an album": ("calm", "hands", "memory"),
            "jump through every puddle in the park": ("laugh", "air", "quick"),
        },
    ),
    "gift": Topic(
        "What should I give my {who} as a birthday present?",
        {
            "sew a quilt from worn out shirts": ("cheap", "hands", "memory"),
            "write a long letter by hand": ("cheap", "calm", "memory"),
            "wrap a jigsaw puzzle of the night sky": ("calm", "hands", "share"),
            "buy a season pass for the botanical garden": ("air", "learn", "calm"),
            "record a silly song on an old tape": ("quick", "laugh", "memory"),
            "fill a basket with cheese and pears": ("quick", "share", "laugh"),
        },
    ),
    "dinner": Topic(
        "What could I cook for my {who} tonight?",
        {
            "roast a tray of lemon potatoes": ("cheap", "quick", "share"),
            "fold dumplings around the kitchen table": ("laugh", "hands", "share"),
            "stir a pot of mushroom risotto": ("calm", "hands", "learn"),
            "grill fresh sardines in the yard": ("quick", "air", "memory"),
            "simmer lentil soup with plenty of cumin": ("cheap", "calm", "share"),
            "flip pancakes high above the pan": ("quick", "laugh", "learn"),
        },
    ),
    "trip": Topic(
        "Where could I go with my {who} on Saturday morning?",
        {
            "climb the hill behind the chapel": ("cheap", "air", "memory"),
            "wander through the flea market": ("cheap", "laugh", "learn"),
            "row a rented boat across the lake": ("hands", "air", "calm"),
            "visit the museum of clocks": ("calm", "learn", "quick"),
            "ride the steam train to the coast": ("laugh", "memory", "share"),
            "pick strawberries on the organic farm": ("hands", "air", "share"),
        },
    ),
    "peace": Topic(
        "How can I make peace with my {who} after a quarrel?",
        {
            "bring a pot of honey to the front door": ("quick", "cheap", "share"),
            "ask for the whole story over black coffee": ("calm", "quick", "learn"),
            "repair the broken fence together": ("hands", "air", "memory"),
            "send a postcard with a bad joke": ("cheap", "quick", "laugh"),
            "take a slow walk along the canal": ("calm", "cheap", "air"),
            "cook the very dish that started the fight": ("laugh", "hands", "share"),
        },
    ),
    "sleep": Topic(
        "How can I help my {who} fall asleep at night?",
        {
            "brew a cup of lavender tea": ("quick", "calm", "share"),
            "hum the same lullaby three times": ("cheap", "calm", "memory"),
            "open the window a hand wide": ("cheap", "quick", "air"),
            "knit ten rows beside the lamp": ("calm", "hands", "learn"),
            "write down tomorrow's chores on paper": ("quick", "hands", "cheap"),
            "count the stars from the balcony": ("air", "learn", "memory"),
        },
    ),
    "cheer": Topic(
        "How do I cheer up my {who} after bad news?",
        {
            "tell the story of the runaway goat": ("cheap", "quick", "laugh"),
            "drive out to watch the sunset": ("calm", "air", "memory"),
            "borrow a puppy for the afternoon": ("laugh", "air", "share"),
            "paint the kitchen a loud yellow": ("laugh", "hands", "memory"),
            "learn a waltz in the living room": ("cheap", "laugh", "learn"),
            "plant a rose under the bedroom window": ("hands", "calm", "air"),
        },
    ),
    "fit": Topic(
        "How can I get my {who} moving again?",
        {
            "swim ten lengths at the public pool": ("calm", "quick", "air"),
            "join the folk dance at the town hall": ("laugh", "learn", "share"),
            "walk the neighbour's dog before breakfast": ("cheap", "air", "quick"),
            "chop firewood for the whole street": ("hands", "air", "share"),
            "take the bicycle to the next village": ("cheap", "air", "memory"),
            "practise fencing with wooden spoons": ("laugh", "learn", "hands"),
        },
    ),
    "balcony": Topic(
        "What can I grow on the balcony with my {who}?",
        {
            "sow radishes in an empty wine crate": ("cheap", "quick", "hands"),
            "train sweet peas up a piece of string": ("calm", "cheap", "memory"),
            "raise cherry tomatoes in tin buckets": ("hands", "share", "learn"),
            "start a pot of basil from seed": ("cheap", "learn", "share"),
            "hang a basket of wild strawberries": ("quick", "laugh", "share"),
            "grow a giant sunflower against the wall": ("laugh", "memory", "learn"),
        },
    ),
    "train": Topic(
        "How should I pass a long train ride with my {who}?",
        {
            "invent a life for every passenger": ("cheap", "laugh", "memory"),
            "play chess on a folding board": ("calm", "learn", "hands"),
            "sketch the stations in a notebook": ("calm", "hands", "memory"),
            "practise ten words of Portuguese": ("quick", "learn", "laugh"),
            "unpack a picnic of olives and bread": ("share", "memory", "quick"),
            "solve the crossword with a blunt pencil": ("calm", "cheap", "learn"),
        },
    ),
}
