"""Public data sets in their original layout -> `sample.Sample`. Not needed to learn the method.

folders.py            entry point `read_samples`; folder layouts, such as DOTA's or xBD's
cross_view.py         pairs of ground and satellite images
json_records.py       records, of which the keys tell the format
documents.py          records in several lists that ids join, such as COCO's
masks.py              boxes and points of a mask
files.py              files of records: JSON, JSON lines, EarthDial shards, parquet; images
image_headers.py      whether an image file is whole, and how large
box_formats.py        how data sets write boxes and questions; makes the Sample
earthdial_results.py  answers that EarthDial released, to score
splits.py             what a source trains on and what it holds out
shared_images.py      no image is trained on and held out
"""
