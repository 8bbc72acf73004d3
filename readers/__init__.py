"""Public data sets in their original layout -> `sample.Sample`. Not needed to learn the method.

folders.py       entry point `read_samples`; folder layouts, such as DOTA's or xBD's
json_records.py  files of records: JSON, JSON lines, EarthDial shards, parquet
box_formats.py   how data sets write boxes and questions; makes the Sample
"""
