"""The phrase tables of training prompts, from which the styles of `training_styles` sample.

Slots of templates are filled from left to right: {F} the item that is placed (figure), {F_it} a pronoun for it, {G} the
anchor of its relation (ground), {where} the place or relation of F, {rel} the relation as a preposition, {inv} its
inverse, {its} the side of G with a pronoun ("to its left"), {alone} the side without a pronoun, {verb} a verb of
position, {put} an imperative, {modal} a modal verb. {is} {s} {es} {has} agree with F, {Gis} {Gs} {Gies} {Ghas} {Gits}
with G.
"""

from __future__ import annotations

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses"}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SIDES = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}

# --- objects ----------------------------------------------------------------------------------------------------------

COLORED_AFTER = (
    "{n} in {c}", "{n} of color {c}", "{n} that {is} {c}", "{n} colored {c}", "{n} which {is} {c}", "{n} painted {c}",
    "{n} filled with {c}", "{n} of {c} color", "{n} made {c}", "{n} ({c})", "{n} whose color is {c}",
    "{n} drawn in {c}",
)  # fmt: skip
"""Nouns with the color after them; without commas, so that they fit everywhere."""
COLORED_BEFORE = ("{c}-colored {n}", "{c} colored {n}", "solid {c} {n}", "{c}-filled {n}", "fully {c} {n}")
NEUTRAL_ADJECTIVES = ("plain", "flat", "simple", "neat", "clean", "solid", "nice", "crisp", "small", "basic", "tidy")
"""Adjectives that no check depends on."""
ANOTHER = ("another {n} ({c})", "another {n} in {c}", "one more {n} in {c}", "another {n} that is {c}")
"""Phrases for another object of a shape; "another red star" would imply a second red star."""
SINGLES = ("one", "a single", "1", "exactly one", "just one", "one single", "a lone")
GROUPS = {
    2: ("a pair of", "a couple of", "a duo of", "exactly two", "2x", "a set of two"),
    3: ("a trio of", "a group of three", "exactly three", "3x", "a set of three", "a total of three"),
}

# --- relations --------------------------------------------------------------------------------------------------------

_BESIDE = (
    "{} of", "to the {} of", "to the {} of", "on the {} of", "on the {} side of", "at the {} of", "just {} of",
    "on the {}-hand side of", "to the {} side of", "immediately to the {} of", "immediately {} of", "directly {} of",
    "somewhere to the {} of", "farther {} than", "further to the {} than", "more to the {} than",
    "right beside and {} of",
    "on the {}-hand side from", "to the {}-hand side of", "straight {} of", "at the {} side of", "just to the {} of",
    "a step to the {} of", "in the space {} of", "next to and {} of", "off to the {} of", "{}ward of",
)  # fmt: skip
RELATIONS = {
    "left of": (*(text.format("left") for text in _BESIDE), "west of", "to the west of"),
    "right of": (
        *(text.format("right") for text in _BESIDE if text != "right beside and {} of"),
        *("east of", "to the east of"),
    ),
    "above": (
        *("above", "above", "above", "over", "over", "on top of", "directly above", "somewhere above", "right above"),
        *("atop", "higher than", "higher up than", "north of", "just above", "straight above", "vertically above"),
        *("at a spot above", "farther up than", "further up than", "in the space above", "immediately above"),
        *("on the upper side of", "directly over", "up above", "a step above", "to the north of"),
    ),
    "below": (
        *("below", "below", "below", "under", "under", "underneath", "beneath", "directly below", "somewhere below"),
        *("right below", "lower than", "lower down than", "farther down than", "further down than", "south of"),
        *("just under", "right beneath", "straight below", "directly under", "just below", "in the space below"),
        *("immediately below", "at a spot below", "on the lower side of", "down below", "a step below"),
        *("to the south of", "directly underneath", "vertically below"),
    ),
}
"""Prepositions, which come before the anchor."""
_ITS_BESIDE = ("to {its} {}", "on {its} {}", "on {its} {} side", "to the {} of {it}", "at {its} {}",
    "on the {} of {it}",
               "{} of {it}", "on {its} {}-hand side")  # fmt: skip
ITS_SIDE = {
    "left of": tuple(text.replace("{}", "left") for text in _ITS_BESIDE),
    "right of": tuple(text.replace("{}", "right") for text in _ITS_BESIDE),
    "above": ("above {it}", "over {it}", "on top of {it}", "directly above {it}", "right above {it}", "just over {it}"),
    "below": ("below {it}", "under {it}", "underneath {it}", "beneath {it}", "directly below {it}", "right under {it}"),
}
SIDE_ALONE = {
    "left of": ("to the left", "on the left side", "at the left"),
    "right of": ("to the right", "on the right side", "at the right"),
    "above": ("on top", "overhead", "above"),
    "below": ("underneath", "below", "beneath"),
}
"""Sides that follow "has" or "with" without a pronoun."""
VERBS = (
    *(
        "{is} placed",
        "{is} located",
        "{is} positioned",
        "{is} shown",
        "{is} found",
        "{is} drawn",
        "{is} put",
        "{is} set",
    ),
    *("sit{s}", "lie{s}", "stand{s}", "appear{s}", "go{es}", "rest{s}", "belong{s}", "{is} situated", "stay{s}"),
    *("can be found", "can be seen", "come{s}", "{is} arranged", "{is} painted", "remain{s}", "{has} its place"),
)
MODALS = (
    *("should be", "must be", "has to be", "needs to be", "should go", "should sit", "is to be", "should appear"),
    *("ought to be", "must sit", "will be", "shall be", "would be", "must stand", "should be placed", "may only be"),
)
MODALS_PLURAL = {"has to be": "have to be", "needs to be": "need to be", "is to be": "are to be"}
ORDERS = (
    *(
        "place",
        "put",
        "draw",
        "add",
        "paint",
        "set",
        "position",
        "insert",
        "sketch",
        "drop",
        "render",
        "show",
        "locate",
    ),
    *("include", "have", "arrange", "keep", "i'd like", "we need", "give me", "depict", "use", "make", "i want"),
)
WHERE_ANY = (
    "{F} {is} {where}", "{F} {is} {where}", "{F} {verb} {where}", "{F} {verb} {where}", "{F} {modal} {where}",
    "place {F} {where}", "put {F} {where}", "position {F} {where}", "set {F} {where}", "keep {F} {where}",
    "{where} {is} {F}", "{where} go{es} {F}", "{where} sit{s} {F}", "let {F} be {where}", "make sure {F} {is} {where}",
    "have {F} sit {where}", "{where} you can see {F}", "you find {F} {where}", "{where}, place {F}", "{where} put {F}",
)  # fmt: skip
"""Statements about the position of F; F may be new or known."""
WHERE_NEW = (
    "there {is} {F} {where}", "{where}, there {is} {F}", "there should be {F} {where}", "{where} there {is} {F}",
    "{put} {F} {where}", "{put} {F} {where}", "{where}, {put} {F}", "we see {F} {where}", "the image has {F} {where}",
    "{F} that {verb} {where}", "{F} which {is} {where}", "{F} {where}", "{F} {where}", "{where} appear{s} {F}",
    "{where} {is} to be {F}",
)  # fmt: skip
"""Statements that introduce F."""
RELATE_ANY = (
    "the spot {rel} {G} is taken by {F}", "the place {rel} {G} belongs to {F}", "{G} {Ghas} {F} {its}",
    "{G} {Ghas} {F} {its}", "{G} {Gis} flanked by {F} {its}",
    "the space {rel} {G} is for {F}", "looking {rel} {G} one finds {F}", "{G} {Ghas} {F} {alone}",
)  # fmt: skip
"""Statements about a relation in which F and G may each be new or known; F is the item that is placed."""
RELATE_DIRECTED = {
    "left of": ("{F} precede{s} {G} on the left", "the left-hand neighbor of {G} {is} {F}",
    "{G} {Ghas} {F} as left neighbor",
                "{F} {is} the left neighbor of {G}", "{G} {Gis} flanked on the left by {F}",
                "{G} {Gis} preceded on the left by {F}", "{G} {Gis} bordered on {Gits} left side by {F}"),
    "right of": ("{F} follow{s} {G} on the right", "the right-hand neighbor of {G} {is} {F}",
                 "{G} {Ghas} {F} as right neighbor", "{F} {is} the right neighbor of {G}",
                 "{G} {Gis} flanked on the right by {F}", "{G} {Gis} followed on the right by {F}",
                 "{G} {Gis} bordered on {Gits} right side by {F}"),
    "above": ("{F} hover{s} over {G}", "{F} top{s} {G}", "{G} {Gis} topped by {F}", "{F} float{s} above {G}",
              "{F} hang{s} above {G}", "{G} carr{Gies} {F} on top", "{F} crown{s} {G}", "{G} {Gis} crowned by {F}"),
    "below": ("{F} hang{s} below {G}", "{F} support{s} {G} from below", "{F} hide{s} under {G}",
              "{G} {Gis} underlined by {F}", "{G} {Ghas} {F} at {Gits} foot", "{F} {is} one level down from {G}"),
}  # fmt: skip
RELATE_NEW = (
    "{G} with {F} {its}",
    "{G}, with {F} {its}",
    "{G}, and {its}, {F}",
    "{G} and {F} {its}",
    "{G} together with {F} {its}",
)
"""Statements that introduce F together with its anchor."""
WHERE_PLAIN = ("{F} {is} {where}", "{F} {is} {where}", "{F} {verb} {where}", "{F} {modal} {where}", "{where} {is} {F}")
"""Full sentences that can follow "such that"."""
INVERSE_NEW = (
    "{G} {Gis} {inv} {F}", "{G} lie{Gs} {inv} {F}", "{G} sit{Gs} {inv} {F}", "{G} {Gis} placed {inv} {F}",
    "{F}, and {G} {Gis} {inv} {F_it}", "{put} {F} so that {G} {Gis} {inv} {F_it}",
)  # fmt: skip
"""Statements with a known G as subject about a new F; the relation belongs to the new item."""
INVERSE_KNOWN = (
    "{G_it} {Gis} {inv} {F}", "{G_it} {Gis} {inv} {F}", "{G_it} lie{Gs} {inv} {F}", "{G_it} {Gis} placed {inv} {F}",
    "{G_it} {Gmodal} {inv} {F}", "{F} {has} {G} {inverse_side}",
)  # fmt: skip
"""Full sentences with a known G as subject, or at the side of F, about an F that was mentioned after it."""
NOWHERE_NEW = (
    "there {is} also {F}", "also {F}", "add {F}", "include {F}", "{F} {is} in it too", "{put} {F} anywhere",
    "{F} somewhere", "{F} {is} there as well", "{F} can go anywhere", "do not forget {F}", "{F} wherever there is room",
    "there {is} {F} too", "the image also has {F}", "{F} in any free spot", "plus {F}", "{put} {F} as well",
)  # fmt: skip
ANYWHERE = ("", "", "", "", "anywhere", "somewhere", "at any spot", "wherever it fits", "in a free spot", "at will")
TABLE_ANYWHERE = ("any", "anywhere", "free", "-", "not given", "your choice", "somewhere", "open", "no preference")

# --- places -----------------------------------------------------------------------------------------------------------

_CORNER = (
    "at the {v} {h}", "at the {v} {h}", "in the {v} {h} corner", "in the {v} {h} corner", "in the {v} {h}",
    "in the {v}-{h} corner", "to the {v} {h}", "in the {v} {h}-hand corner", "in the {v}-{h} area", "at {v} {h}",
    "in the corner at the {v} {h}", "on the {v} {h}", "in the {v} row on the {h}", "in the {h} column of the {v} row",
    "at the {h} end of the {v} row", "in the {v} {h} cell", "in the far {v} {h}", "in the {v}-{h}",
    "on the {v} {h} side",
    "in the {h} {v} corner", "{v} {h}", "in the {compass} corner", "at the {v} on the {h}", "in the {v} {h} region",
    "in the extreme {v} {h}", "on the {h} of the {v} row",
)  # fmt: skip
_UPRIGHT = (
    "at the {v}", "at the {v}", "at the {v} center", "in the {v} middle", "in the middle of the {v} row",
    "at the very {v}",
    "in the middle of the {v} edge", "at the {v} in the middle", "in the center of the {v} row", "in the {v} center",
    "centered at the {v}", "at the {v} edge", "in the {v} center cell", "in the middle column of the {v} row",
    "{v} center",
    "halfway along the {v} edge", "on the {v} side", "at the middle of the {v}", "in the {v} row in the middle",
    "along the {v} edge in the center", "{v} middle", "in the {v}-center spot",
)  # fmt: skip
_SIDE = (
    "at the {h}", "on the {h}", "on the {h}", "on the {h} side", "at the {h} edge", "in the middle {h}",
    "on the far {h}",
    "in the middle of the {h} edge", "halfway down the {h} side", "at the {h} end of the middle row",
    "at the center {h}",
    "in the middle row on the {h}", "on the {h}-hand side", "in the {h} middle", "centered on the {h} side",
    "middle {h}",
    "midway down the {h} edge", "in the {h} column of the middle row", "at the middle of the {h} side", "center {h}",
    "in the {h} column at middle height", "at the center of the {h} edge", "in the center {h} cell",
)  # fmt: skip
_VERTICAL = {"top": ("top", "upper"), "bottom": ("bottom", "lower")}
_COMPASS = {"top": "north", "bottom": "south", "left": "west", "right": "east"}
_NOUNS_ONLY = frozenset({"at the {v}", "at the very {v}", "at the {v} in the middle", "centered at the {v}",
                         "at the middle of the {v}", "at the {v} on the {h}"})  # fmt: skip


def _corner(vertical: str, horizontal: str) -> tuple[str, ...]:
    compass = _COMPASS[vertical] + _COMPASS[horizontal]
    return tuple(
        text.format(v=word, h=horizontal, compass=compass)
        for text in _CORNER
        for word in (_VERTICAL[vertical][:1] if text in _NOUNS_ONLY else _VERTICAL[vertical])
    )


def _upright(vertical: str) -> tuple[str, ...]:
    return (
        tuple(
            text.format(v=word)
            for text in _UPRIGHT
            for word in (_VERTICAL[vertical][:1] if text in _NOUNS_ONLY else _VERTICAL[vertical])
        )
        + (f"at the {vertical}",) * 3
    )


PLACES: dict[str, tuple[str, ...]] = {
    **{f"{v} {h}": _corner(v, h) for v in ("top", "bottom") for h in ("left", "right")},
    **{v: _upright(v) for v in ("top", "bottom")},
    **{h: tuple(text.format(h=h) for text in _SIDE) for h in ("left", "right")},
    "center": (
        *(
            "in the center",
            "in the middle",
            "at the center",
            "in the central spot",
            "right in the middle",
            "dead center",
        ),
        *("in the very center", "in the exact middle", "in the middle of the canvas", "at the heart of the image"),
        *("in the central cell", "in the middle of the image", "in the middle cell", "smack in the middle"),
        *(
            "in the center of the middle row",
            "at the midpoint",
            "in the very middle",
            "center",
            "in the core",
        ),
        *("at the exact center", "in the center of the image", "in the center cell"),
    ),
}
"""Phrases for the nine cells; "at the top" without a side means the middle of the top row."""
LABELS: dict[str, tuple[str, ...]] = {
    **{
        f"{v} {h}": tuple(
            text
            for w in _VERTICAL[v]
            for text in (f"{w} {h}", f"{w}-{h}", f"{w} {h} corner", f"{h} {w} corner", f"{w} row {h}")
        )
        for v in ("top", "bottom")
        for h in ("left", "right")
    },
    **{v: (v, v, f"{v} center", f"{v} middle", f"{v}-center", f"{v} row middle",
    f"middle of {v} row") for v in _VERTICAL},
    **{h: (h, h, f"middle {h}", f"center {h}", f"center-{h}", f"{h} edge", f"middle row {h}", f"{h} side") for h in
       ("left", "right")},
    "center": ("center", "middle", "dead center", "central", "very center", "exact middle"),
}  # fmt: skip
"""Short names of the nine cells for tables and telegrams."""

# --- around the request -----------------------------------------------------------------------------------------------

OPENERS = (
    *("a photo of ", "a picture of ", "an image of ", "please draw ", "i want ", "make a picture with ", "generate "),
    *("create an image with ", "an illustration showing ", "a drawing with ", "show ", "i need ", "paint ", "depict "),
    *("a simple graphic of ", "a plain canvas with ", "a scene with ", "could you draw ", "render ", "sketch "),
    *("design a flat icon with ", "minimal vector art: ", "flat design: ", "a poster with ", "an arrangement of "),
    *("prompt: ", "draw me ", "hi! please make an image of ", "i would like to see ", "we are looking for ",
    "imagine "),
    *("a composition made of ", "clean vector style, ", "geometric art with ", "give me ", "produce a picture of "),
    *("hey, can i get ", "shapes on a canvas: ", "a minimalist graphic showing ", "picture this: ", "let's have "),
    *("a tidy layout with ", "a diagram of ", "display ", "task: draw ", "compose an image that contains "),
    *("what i have in mind is ", "for my slides i need ", "my kid wants ", "a cartoon of ", "kindly provide "),
)  # fmt: skip
LIST_HEADS = (
    *("", "", "", "", "objects: ", "draw this: ", "list: ", "please draw the following: ", "layout: ", "scene: "),
    *("what to draw: ", "contents: ", "it should contain: ", "the image: ", "here is what i need: ", "wanted: "),
    *("elements: ", "specification: ", "spec: ", "shapes: ", "to draw: ", "composition: ", "create: ", "arrangement: "),
)
NUMBERED_HEADS = ("{n} objects: ", "{n} shapes in total: ", "an image of {n} shapes: ", "exactly {n} objects: ",
                  "draw {n} things: ", "all in all {n} shapes: ")  # fmt: skip
ENDINGS = (
    *(" on a plain background", " on an empty canvas", " on a light background", " on white", ", please", ", thanks"),
    *(
        " against a blank background",
        ", flat style",
        ", nothing else",
        ", minimal",
        ", simple and clean",
        ", vector art",
    ),
    *(", no text", ", high quality", " on a pale backdrop", ", in a {nonce} style", ", clean edges", ", thank you"),
    *(", and nothing more", ", drawn neatly", ", kind of {nonce}", ", 4k", " before a light backdrop", ", no shadows"),
)
FILLERS = (
    *(
        "keep it simple",
        "nothing else should be in it",
        "no text and no shadows",
        "use flat colors",
        "thanks in advance",
    ),
    *(
        "the background stays plain",
        "make it look clean",
        "this is for a slide deck",
        "sizes do not matter",
        "thank you",
    ),
    *("everything else stays empty", "do not add anything else", "i am making cards for my kids", "no borders please"),
    *("a clean vector style would be great", "leave the rest blank", "take your time", "it is for a {nonce} project"),
    *("hello there", "i hope you can help me", "the mood is {nonce}", "keep the edges sharp", "style: minimal"),
    *("please read carefully", "that is all", "the shapes must not touch", "my boss needs it today", "style: {nonce}"),
    *(
        "call it {nonce}",
        "it will be printed as a sticker",
        "make it {nonce} and friendly",
        "think of a {nonce} poster",
    ),
    *("plain background", "we want a calm look", "be precise", "the canvas is small", "this one is for {nonce}"),
)
"""Sentences that no check depends on."""
JOINTS = (
    ", ",
    ", ",
    ", and ",
    "; ",
    ", plus ",
    ", then ",
    ", next ",
    " / ",
    ", further ",
    ", as well as ",
    " + ",
    ", also ",
)
CLAUSE_JOINTS = ("; ", ", ", ", and ", ", then ", "; then ", "; also, ", " - ", "; next, ", ", and then ", " | ")
LAST_JOINTS = (", and ", " and ", ", ", " as well as ", " plus ", ", together with ", " along with ", " & ", ", then ")
WITH = ("with", "with", "that has", "having", "featuring", "carrying")
RELATIVES = ("that {verb}", "that {is}", "which {is}", "which {verb}", "{verb_ing}", "to be placed", "that {modal}")
STEPS = (
    ("first, ", "start with: ", "begin: ", "step one: ", "to begin, ", "first of all, "),
    ("then ", "next, ", "after that, ", "now ", "then, ", "afterwards, ", "following that, ", "next up: ", "also, "),
    ("finally, ", "lastly, ", "in the end, ", "last, ", "to finish, ", "at last, "),
)
QUESTIONS = ("could you {}?", "can you {}?", "would you please {}?", "would you {}?", "will you {}?",
    "may i ask you to {}?",
             "can you please {}?", "do you think you could {}?", "is it possible to {}?")  # fmt: skip
QUESTION_VERBS = ("draw", "add", "put", "place", "make", "show", "include", "paint", "create", "render")
TABLE_KEYS = (("object", "position"), ("item", "where"), ("what", "where"), ("shape", "location"), ("thing", "place"),
              ("name", "pos"), ("element", "placement"))  # fmt: skip
RULE_HEADS = ("", "", "", "rules: ", "where: ", "positions: ", "conditions: ", "note that ", "such that ", "layout: ",
              "constraints: ", "their places: ", "arranged so that ")  # fmt: skip
TITLES = ("# {}\n", "{}\n", "**{}**\n", "title: {}. ", "[{}] ", '"{}": ', "{} - ", "image: {}. ", "{}:\n")
TITLE_NAMES = ("shapes", "composition", "request", "flat shapes", "the scene", "my image", "{nonce}",
    "minimal geometry",
               "image 1", "order", "{nonce} study", "card", "poster", "a puzzle", "scene description")  # fmt: skip
