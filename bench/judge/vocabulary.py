"""The words of the captions: objects with their icons, styles, backgrounds, and the grammar of coloured shapes."""

# Each line: the icon's name in the npm packages, then what captions call it, the judge's name first.
_OBJECTS = """
red-apple: red apple|apple
green-apple: green apple
banana: banana
lemon: lemon
tangerine: orange fruit|tangerine
pear: pear
peach: peach
cherries: cherries|two cherries
grapes: grapes|bunch of grapes
strawberry: strawberry
watermelon: watermelon|slice of watermelon
pineapple: pineapple
kiwi-fruit: kiwi|kiwi fruit
tomato: tomato
eggplant: eggplant|aubergine
avocado: avocado
carrot: carrot
broccoli: broccoli
mushroom: mushroom|toadstool
bread: bread|loaf of bread
croissant: croissant
cheese-wedge: cheese|piece of cheese
egg: egg
hamburger: hamburger|burger
pizza: pizza|slice of pizza
hot-dog: hot dog
doughnut: doughnut|donut
cookie: cookie|biscuit
birthday-cake: birthday cake|cake
lollipop: lollipop
beer-mug: mug of beer|beer
wine-glass: glass of wine|wine
hot-beverage: cup of coffee|coffee
teapot: teapot
cat-face: cat|kitten
dog-face: dog|puppy
pig-face: pig
cow-face: cow
mouse-face: mouse
bear: bear
panda: panda
koala: koala
fox: fox
lion: lion
tiger-face: tiger
frog: frog
penguin: penguin
owl: owl
baby-chick: chick|baby chick
fish: fish
spouting-whale: whale
octopus: octopus
crab: crab
lady-beetle: ladybug|ladybird
honeybee: bee|honeybee
butterfly: butterfly
turtle: turtle|tortoise
spider: spider
sunflower: sunflower
tulip: tulip
rose: rose
cherry-blossom: cherry blossom
cactus: cactus
palm-tree: palm tree|palm
evergreen-tree: fir tree|pine tree
deciduous-tree: tree
maple-leaf: maple leaf
four-leaf-clover: clover|four leaf clover
sun: sun
crescent-moon: moon|crescent moon
cloud: cloud
rainbow: rainbow
snowflake: snowflake
fire: fire|flame
droplet: drop of water|water drop
high-voltage: lightning|lightning bolt
umbrella: umbrella
globe-showing-europe-africa: globe|earth
automobile: car|red car
taxi: taxi
bus: bus
police-car: police car
fire-engine: fire engine|fire truck
bicycle: bicycle|bike
rocket: rocket
airplane: airplane|plane
sailboat: sailboat
house: house
anchor: anchor
balloon: balloon
wrapped-gift: present|gift
soccer-ball: soccer ball|football
basketball: basketball
trophy: trophy|cup
crown: crown
gem-stone: gem|blue gem
key: key
locked: padlock|lock
bell: bell
light-bulb: light bulb|lamp
hammer: hammer
pencil: pencil
closed-book: book|red book
camera: camera
telephone: telephone|phone
alarm-clock: alarm clock|clock
guitar: guitar
magnet: magnet
bomb: bomb
ghost: ghost
jack-o-lantern: pumpkin|jack-o-lantern
skull: skull
alien: alien
top-hat: top hat|hat
"""
OBJECTS = {
    icon: tuple(words.strip().split("|")) for icon, words in (line.split(":") for line in _OBJECTS.strip().splitlines())
}

# The word of captions for a style, and the npm package whose icons have it.
STYLES = {"flat": "fluent-emoji-flat", "glossy": "fluent-emoji", "classic": "noto"}

BACKGROUNDS = {
    "white": "#ffffff",
    "gray": "#a0a4a8",
    "light blue": "#a8d8ff",
    "light green": "#b4f0b0",
    "light yellow": "#fff2a0",
    "light pink": "#ffc8dc",
}

COLOURS = {
    "red": "#e02020",
    "orange": "#ff8c00",
    "yellow": "#ffd800",
    "green": "#20a030",
    "blue": "#2050e0",
    "purple": "#8020b0",
    "pink": "#ff60b0",
    "black": "#101014",
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond")
SIZES = {"small": 19.0, "": 28.0, "large": 42.0}  # radii, in pixels of a picture of 128
PLACES = {
    "in the center": (0, 0),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the top left corner": (-1, -1),
    "in the top right corner": (1, -1),
    "in the bottom left corner": (-1, 1),
    "in the bottom right corner": (1, 1),
}

# Never seen in training: the judge asks for them.
HELD_OUT_SHAPES = {
    ("purple", "star"),
    ("green", "heart"),
    ("orange", "square"),
    ("pink", "triangle"),
    ("blue", "diamond"),
    ("yellow", "circle"),
}
_SOME = list(OBJECTS)[1::4]  # every fourth object misses one of its styles, in turn
HELD_OUT_ICONS = {(icon, list(STYLES)[place % len(STYLES)]) for place, icon in enumerate(_SOME)}
