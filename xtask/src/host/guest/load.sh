#!/bin/sh
# In a container: asks for its role and access key, again and again, and notes each answer in a file of the host: the times
# of its beginning and end, and what `ask` says. Begins to note once it has got any.
ask 200 > /dev/null
while :; do
    begin=$(date +%T)
    said=$(ask 1)
    echo "$begin $(date +%T) $said" >> "/seen/$NAME"
    sleep 0.2
done
