for i in $(seq 1 40); do
rm -rf d; mkdir d; cd d
/work/main/target/debug/pumphouse serve --queue shown=log: --listen 127.0.0.1:7070 --database sqlite://p.db >/dev/null 2>log & P=$!
until grep -q "listening on" log; do sleep 0.002; done
S=$(curl -s -o out -w '%{http_code}' -X PUT -H 'content-type: application/json' localhost:7070/admin/v1/queues/other -d '{"handler":{"kind":"http","url":"http://127.0.0.1:9/"}}')
if [ $S != 201 ]; then echo "$i: $S"; cat log; fi
kill -9 $P; wait $P 2>/dev/null
cd ..
done
