# sh killed.sh CODE FOLDER: a train.py for FOLDER exited with CODE. If a signal killed it (CODE is 128 + signal), it could
# not write its reason, so this script does. Exits with CODE.
if [ "$1" -ge 128 ] && [ -d "$2" ] && ! [ -e "$2/failure.txt" ]; then
	echo "killed by signal $(($1 - 128)) (9: often too little memory)" >"$2/failure.txt"
fi
exit "$1"
