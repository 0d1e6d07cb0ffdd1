# Starts the engine; first sets CANN's variables where the image has CANN.
for file in /usr/local/Ascend/cann/set_env.sh /usr/local/Ascend/ascend-toolkit/set_env.sh; do
  if [ -f "$file" ]; then
    source "$file"
    break
  fi
done
exec mllama-graph "$@"
