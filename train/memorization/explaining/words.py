"""Common words to put in the place of others: nouns that every text encoder knows, of many subjects."""

TEXT = """
acorn anchor apple apron arrow autumn bakery balloon banana barn basket beach bell bicycle bird blanket boat bottle
bowl branch bread bridge brush bucket butterfly button cabin cactus camera candle canyon carpet castle chair cherry
circle clock cloud coast coffee compass corner cottage cotton crown curtain desert diamond dinner dolphin dragon
drawer eagle engine family feather fence field fire flower forest fountain garden gate glass glove grape guitar
hammer harbour hat hill honey horse house island jacket jungle kettle kitchen ladder lake lamp leaf lemon letter
library lion market meadow mirror moon mountain mouse museum needle night ocean office onion orchard owl paint paper
parade pencil piano pillow planet plate pocket pony potato puzzle rabbit rain ribbon river road robot rocket rope
rose sail sand school shadow sheep shell ship shirt silver sky snow soup spoon spring square stairs star station
stone storm street summer sun swan table teacher temple tent theatre thread tiger tower train tree tulip tunnel
turtle umbrella valley village violin wagon wall water whale wheel window winter wolf wood yard zebra
"""
WORDS = tuple(TEXT.split())
