"""A few prompts of each benchmark in its official file format, and systems that draw without a model."""

import json

import numpy as np

from clvr_jax.evaluation.systems.system import System, SystemOutput

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
    {
        "tag": "counting",
        "include": [{"class": "cup", "count": 2}],
        "exclude": [{"class": "cup", "count": 3}],
        "prompt": "a photo of two cups",
    },
    {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a photo of a red cat"},
]
GENEVALPP = [
    {"tag": "counting", "include": [{"class": "cup", "count": 5}], "exclude": [{"class": "cup", "count": 6}],
     "prompt": "A photo of five cups"},
    {"tag": "size_spatial_attr", "include": [{"class": "dog", "count": 1, "size": "larger", "region": "above"},
     {"class": "cat", "count": 1, "size": "smaller", "region": "left", "color": "red"}], "prompt": "A photo of both"},
]  # fmt: skip
GENEVAL2 = [
    {
        "prompt": "two blue cups on a box",
        "atom_count": 4,
        "vqa_list": [
            ["How many cups are in the image?", "two"],
            ["Are the cups blue?", "Yes"],
            ["Are there any cups in the image?", "Yes"],
            ["Are the cups on the box?", "Yes"],
        ],
        "skills": ["count", "attribute", "object", "position"],
    },
    {
        "prompt": "a running dog",
        "atom_count": 3,
        "vqa_list": [
            ["How many dogs are in the image?", "one"],
            ["Are there any dogs in the image?", "Yes"],
            ["Is the dog running?", "Yes"],
        ],
        "skills": ["count", "object", "verb"],
    },
]
IMAGINE = [
    {"id": number, "instruction": f"A photo of {number}.", "note": "It is changed.", "type": kind}
    for number, kind in enumerate(("COLOR", "MATERIAL", "TIME", "Multi-Object"), start=1)
]
WISE = [
    {"Prompt": f"Thing {id}", "Explanation": "It shows it.", "Category": "c", "Subcategory": "s", "prompt_id": id}
    for id in (1, 500, 530, 650, 750, 850, 950)
]
_DPG_COLUMNS = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
DPG = f"""{_DPG_COLUMNS}question_natural_language
a,"a dog on a mat",,1,0,entity,whole,entity - whole (dog),Is there a dog?
a,"a dog on a mat",,2,0,entity,whole,entity - whole (mat),Is there a mat?
a,"a dog on a mat",,3,"{{dependency}}",attribute,color,"attribute - color (mat, red)",Is the mat red?
b,"a cup, blue",,1,0,entity,whole,entity - whole (cup),Is there a cup?
b,"a cup, blue",,2,1,attribute,color,"attribute - color (cup, blue)",Is the cup blue?
b,"a cup, blue",,3,2,attribute,texture,"attribute - texture (cup, shiny)",Is the blue cup shiny?
b,"a cup, blue",,4,0,global,,global - (photo),Is it a photo?
"""


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


class ColorGenerator:
    """An image generator whose images have one color for each seed; records its requests."""

    def __init__(self, fail_after=None):
        self.asked, self.fail_after = [], fail_after

    def __call__(self, prompts, seeds):
        for prompt, seed in zip(prompts, seeds, strict=True):
            if self.fail_after is not None and len(self.asked) >= self.fail_after:
                raise KeyboardInterrupt
            self.asked.append((prompt, seed))
            yield SystemOutput(np.full((8, 8, 3), seed % 256, np.uint8), nfe=4)

    @property
    def system(self):
        return System(self, {"mode": "colors"}, "cpu", batch_size=2)
