"""The words of the stories: one table per kind of word, the most frequent row first.

A row is a dictionary of the forms that the grammar asks for. The form "" is the word itself; "a" is the
word after its article ("a kite", "an owl"); rows of people have pronouns, rows of places have spots to
search, and so on. A form that is a list is a table of its own, from which the grammar draws later: where a
thing may hide depends on the place.
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

GIRLS = """Mia Lily Anna Rosie Ella Zoe Nora Ivy Clara Ruby Maya Hazel Lucy Alice Emma Stella Daisy Freya
Amara Leila Greta Wendy Sofia Tessa Olive Priya Yuki Carmen Elsa Holly June Kira Lena Nina Poppy Rita Sadie
Vera Willa Zara""".split()
BOYS = """Tom Ben Leo Sam Max Finn Jack Oscar Hugo Noah Theo Eli Arlo Felix Kofi Diego Owen Ravi Jonas Milo
Otto Pablo Quinn Rufus Simon Toby Victor Walter Yusuf Zack Adam Bruno Caleb Dario Emil Frank George Henry
Ivan Jasper""".split()
SHE_FRIENDS = """Dot Fern Pearl Clover Misty Tansy Bella Willow Coco Honey Juniper Maple Nutmeg Pepper
Saffron Thistle Velvet Winnie""".split()
HE_FRIENDS = """Pip Bram Rusty Biscuit Moss Bobo Tuft Chip Ziggy Acorn Barnaby Cricket Dusty Fergus Gulliver
Humphrey Monty Nimbus""".split()

# name of the table -> its words, in order of frequency
WORDS = {
    "TRAITS": """little, kind, clever, brave, curious, cheerful, shy, gentle, quiet, funny, careful,
        playful, patient, friendly, lively, dreamy, bold, polite, busy, bright, stubborn, thoughtful,
        sleepy, quick, noisy, tidy, merry, hungry, adventurous, impatient""",
    "FRIEND_TRAITS": """small, wise, old, fluffy, brown, grey, plump, tiny, furry, speckled, spotted, silly,
        skinny, young, chubby, muddy, striped, elegant, graceful, clumsy, lazy, tall, ancient, golden,
        freckled""",
    "ANIMALS": """fox, rabbit, owl, hedgehog, squirrel, mouse, bear, frog, badger, duck, otter, deer, cat,
        puppy, turtle, goose, mole, beaver, crow, robin, lamb, goat, pony, donkey, sparrow, snail, raccoon,
        hen, swan, seal, peacock, wolf, lizard, pelican, monkey, parrot""",
    "DOINGS": """singing a song, digging a hole, eating berries, reading a newspaper, sweeping leaves,
        chasing butterflies, taking a nap, picking mushrooms, hanging up laundry, counting acorns, painting
        a sign, humming a tune, looking for worms, drinking tea, knitting a sweater, carrying firewood,
        fixing a bicycle, practicing somersaults, collecting shells, polishing spectacles, juggling turnips,
        stirring a pot""",
    "HOMES": """house, cottage, cabin, farmhouse, tower, flat, tent, castle, barn, windmill, houseboat,
        treehouse, lighthouse, hut, bungalow, wagon, palace, inn, shed, igloo""",
    "HOME_LOOKS": """small, cozy, white, tiny, crooked, quaint, pink, narrow, sunlit, stone, creaky, big,
        painted, lonely, humble, round""",
    "SITES": """near the river, by the sea, on a hill, at the edge of town, in a green valley, next to a
        bakery, beside a lake, behind the school, at the end of a lane, under the mountains, across from a
        church, above a shop, among the birches, along the canal, close to a bridge, in the middle of a
        meadow, between two oaks, on an island, beyond the railway, not far from the border""",
    "AGES": "six, seven, five, eight, nine, ten, four, eleven, twelve",
    "LOOKS": """shiny, new, pretty, soft, old, special, lovely, smooth, fine, sparkling, strange, handmade,
        magic, glossy, simple, precious, worn, delicate, fancy, sturdy, marvelous, unusual, antique""",
    "COLORS": """red, blue, yellow, green, purple, silver, orange, black, violet, turquoise, scarlet,
        copper, crimson, lilac, ivory, bronze, emerald, indigo""",
    "FAMILY": """grandmother, father, mother, grandfather, aunt, uncle, sister, brother, cousin, teacher,
        neighbor, godmother, babysitter, coach, tutor""",
    "TIMES": """morning, day, afternoon, evening, Saturday, Sunday, Monday, Tuesday, Wednesday, Thursday,
        Friday, weekend, birthday, holiday""",
    "GOING": """walked, went, ran, skipped, hurried, wandered, strolled, marched, raced, cycled, tiptoed,
        hiked, danced, galloped, trotted, scampered, dashed, rambled""",
    "SAD": """sad, worried, upset, lonely, gloomy, anxious, heartbroken, nervous, miserable, hopeless,
        unhappy, tearful, troubled, sorrowful""",
    "GLAD": """happy, glad, joyful, proud, delighted, thankful, relieved, excited, thrilled, grateful,
        overjoyed, content, amazed, pleased""",
    "SAID": """said, whispered, replied, answered, called, laughed, shouted, murmured, sighed, mumbled,
        exclaimed""",
    "MANNERS": """softly, kindly, quietly, gently, slowly, politely, warmly, shyly, calmly, eagerly, loudly,
        sweetly, firmly, seriously, bravely, hoarsely, wearily, solemnly""",
    "PROMISES": """I will help you; Two can search better than one; We will find a way; Let us think
        together; I know what to do; Every problem has an answer; My nose never fails; Take a deep breath;
        Just follow me; I have a plan; Dry your eyes; You can count on me; Trust my whiskers; Leave it to
        me""",
    "FOODS": """warm bread, apple pie, honey cakes, pancakes, strawberries, cookies, hot soup, cheese
        sandwiches, roasted chestnuts, cherry tart, ripe plums, ginger biscuits, lemon pudding, noodles,
        fresh waffles, blueberry muffins, buttered toast, carrot stew, sweet grapes, popcorn, tomato salad,
        cinnamon rolls, mashed potatoes, peach jam, crunchy nuts, oatmeal, fried eggs, rice dumplings,
        cocoa, baked beans, raspberry sherbet, watermelon, pumpkin pasties, mango slices, yogurt, walnut
        fudge""",
    "GAMES": """played tag, sang songs, told jokes, danced, played chess, jumped rope, climbed trees, drew
        pictures, built towers, flew paper planes, caught fireflies, made wreaths, rolled in the hay,
        watched the stars, wrote poems, threw snowballs, skimmed stones, acted out plays, guessed riddles,
        blew bubbles""",
    "MORALS": """a good friend is a treasure; kindness always comes back; nothing is lost for ever; sharing
        makes everything better; it is fine to ask for help; patience wins in the end; small paws can do
        great deeds; two heads are wiser than one; a smile costs nothing; true friends come in every size;
        giving up is never the answer; strangers can become friends; courage grows with practice; honest
        words mend most troubles; luck likes those who try; listening is a kind of magic; even dark clouds
        pass""",
}

# the things that a hero may own, by how they get lost; the classes take turns in the order of frequency
THINGS = {
    "wind": """kite, balloon, scarf, hat, feather, ribbon, flag, umbrella, map, letter, drawing, pinwheel,
        cape, handkerchief, parachute, blanket""",
    "round": """ball, marble, hoop, wheel, coin, bead, button, drum, globe, pebble, spool, barrel, melon,
        top, disc, balloon pump""",
    "small": """doll, book, key, whistle, bell, ring, teddy bear, watch, compass, lantern, necklace, pencil,
        flute, puppet, mitten, robot""",
}
WAYS = {
    "wind": """flew away in the wind, blew over a fence, was carried off by a sudden gust, drifted out of
        sight, sailed away over the roofs, fluttered up and disappeared""",
    "round": """rolled away down a slope, bounced out of sight, spun away over the stones, hopped off like a
        flea, tumbled into a ditch, wobbled away without a sound""",
    "small": """slipped through a hole in the bag, fell out of the basket, was left behind somewhere,
        dropped to the ground unseen, slid off the seat, vanished in a blink""",
}

# the place | what one does there | where the hero looks first | and then | where the thing is found
PLACES = """
in the park | play on the swings, feed the pigeons | under the bench, beside the slide |
    behind the fountain, near the gate | in a flower bed, at the foot of a statue, in the sandbox
in the forest | pick blueberries, listen to the birds | behind a log, under the ferns |
    among the pines, around the old stump | in a hollow tree, inside a fox hole, on a mossy rock
at the beach | build a sandcastle, look for shells | under the towel, behind the dunes |
    along the waves, near the pier | in a tide pool, under some seaweed, inside a rowboat
in the garden | water the roses, plant tulips | under the rhubarb, behind the greenhouse |
    beside the hedge, in the wheelbarrow | under a cabbage leaf, in the watering can, among the sunflowers
at the market | buy some peaches, see the jugglers | under the stalls, behind the crates |
    among the baskets, around the flower cart | in a sack of flour, between two cheeses, under a melon cart
at the farm | ride the tractor, pet the calves | behind the henhouse, in the pigsty |
    under the hay wagon, around the well | in the horse trough, in a nest of straw, inside a milk bucket
in the library | read about dragons, borrow a comic | under the tables, behind the curtain |
    between the shelves, beside the globe | inside an atlas, under a cushion, on top of the piano
at the lake | watch the dragonflies, learn to swim | under the jetty, behind the reeds |
    beside the canoe, along the shore | on a lily pad, in a fishing net, between two pebbles
in the meadow | chase grasshoppers, gather daisies | in the clover, under the thistles |
    beside the brook, behind the haystack | in a rabbit burrow, under a toadstool, among the poppies
at the zoo | visit the giraffes, draw the zebras | near the penguins, behind the ticket booth |
    around the camels, beside the cages | in the elephant house, under a zebra, in a bamboo bush
at the station | wave at the trains, meet a visitor | under the clock, behind the suitcases |
    along the platform, beside the kiosk | in a mail bag, on the luggage rack, under a timetable
in the museum | see the mummies, sketch a dinosaur | behind the armor, under the staircase |
    beside the vases, around the skeleton | in a pharaoh mask, inside a cannon, under a velvet rope
at the harbor | greet the sailors, count the boats | behind the anchors, under the crane |
    beside the ferry, among the ropes | in a lobster trap, inside a lifebelt, on a coil of chain
in the orchard | gather apples, prune the branches | under the ladder, behind the beehives |
    among the pears, beside the cart | in a bird nest, inside a cider jug, under a heap of twigs
at the circus | watch the acrobats, cheer for the clowns | under the bleachers, behind the trapeze |
    around the ring, beside the ponies | in a magician hat, inside a tuba, under the popcorn machine
in the mountains | follow a goat trail, yodel at the cliffs | behind a boulder, under the waterfall |
    along the ridge, beside the glacier | in a shallow cave, in an eagle nest, under a heather bush
at the playground | climb the ropes, spin on the carousel | under the seesaw, behind the tunnel |
    beside the ladder, around the maze | in a puddle, inside a tire, under a pile of leaves
in the village | visit the blacksmith, dance at the fair | behind the chapel, under the arches |
    beside the pump, around the tavern | in a flower pot, on a windowsill, inside a bread oven
"""

# the weather | as a sentence of its own | as it is met on the way home
WEATHER = """
sunny | The sun was shining | in the sunshine
windy | The wind was blowing | against the wind
rainy | Soft rain was falling | through the rain
cloudy | Grey clouds filled the sky | under the clouds
snowy | White snow covered everything | through the snow
foggy | Thick fog hid the hills | through the fog
stormy | Thunder rumbled far away | before the thunder came
frosty | Ice glittered on every twig | over the ice
hot | The air shimmered with heat | in the heat
breezy | A light breeze was stirring | with the breeze
misty | Mist rose from the fields | through the mist
hazy | A pale haze dimmed the light | through the haze
"""

# what a friend has, and laments | how the hero mends it
TROUBLES = """
a thorn in one foot | pulled out the thorn
no food for the winter | filled a sack with nuts
nobody to play with | taught everyone a new game
a hole in the roof | patched the roof with moss
a bad cold | cooked a pot of broth
no bed to sleep in | made a bed of dry grass
a very heavy trunk to carry | pushed the trunk uphill
a broken cart | hammered the cart together
a tangled fishing line | untied every knot
lost the way home | drew a chart of the paths
dropped a crown into the well | fetched the crown with a hook
spilled all the paint | mixed some fresh paint
forgotten how to whistle | whistled until the tune came back
eaten too many plums | brewed some peppermint tea
torn a good coat | stitched the coat with thread
quarreled with a twin | carried a note of apology
"""


def _split(text: str) -> list[str]:
    separator = ";" if ";" in text else ","
    return [" ".join(word.split()) for word in text.split(separator)]


def _row(word: str, **forms: Any) -> Row:
    return {"": word, "a": ("an " if word[0] in "aeiou" else "a ") + word, **forms}


def _rows(words: str) -> list[Row]:
    return [_row(word) for word in _split(words)]


def _columns(table: str) -> list[list[str]]:
    """The cells of a table, one row a line; a line that begins with a blank continues the one before."""
    lines = table.replace("\n    ", " ").strip().split("\n")
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def _take_turns(*tables: list[Row]) -> list[Row]:
    return [row for turn in zip(*tables, strict=True) for row in turn]


def _people(names: list[str], kind: str, he: str, him: str, his: str) -> list[Row]:
    forms = {"kind": kind, "a_kind": f"a {kind}", "he": he, "him": him, "his": his, "they": "they"}
    return [_row(name, name=name, **forms) for name in names]


def _tables() -> dict[str, list[Row]]:
    tables = {name: _rows(words) for name, words in WORDS.items()}
    girls = _people(GIRLS, "girl", "she", "her", "her")
    boys = _people(BOYS, "boy", "he", "him", "his")
    tables["HEROES"] = _take_turns(girls, boys)
    # A story told by its hero says "I", "me", "my" where another says "Mia", "her", "her".
    first_person = {"": "I", "he": "I", "him": "me", "his": "my", "they": "we"}
    tables["NARRATORS"] = [{**row, **first_person} for row in tables["HEROES"]]
    tables["FRIENDS"] = _take_turns(
        _people(HE_FRIENDS, "", "he", "him", "his"), _people(SHE_FRIENDS, "", "she", "her", "her")
    )
    tables["THINGS"] = _take_turns(
        *([_row(word, ways=_rows(WAYS[kind])) for word in _split(words)] for kind, words in THINGS.items())
    )
    tables["PLACES"] = []
    for where, purposes, near, far, found in _columns(PLACES):
        forms = {"purposes": purposes, "near": near, "far": far, "found": found}
        lists = {form: _rows(cell) for form, cell in forms.items()}
        tables["PLACES"].append(_row(where.split(" ", 2)[2], where=where, **lists))
    tables["WEATHER"] = [_row(word, now=now, home=home) for word, now, home in _columns(WEATHER)]
    tables["TROUBLES"] = [_row(trouble, mend=mend) for trouble, mend in _columns(TROUBLES)]
    return tables


TABLES = _tables()
