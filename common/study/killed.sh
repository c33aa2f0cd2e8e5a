# sh killed.sh CODE FOLDER: the train.py of FOLDER exited with CODE. If a signal killed it (CODE: 128 + signal), it
# could not write its reason: this script writes it to FOLDER/failure.txt. Exits with CODE.
if [ "$1" -ge 128 ] && [ -d "$2" ] && ! [ -e "$2/failure.txt" ]; then
	echo "killed by signal $(($1 - 128)) (9: often too little memory)" >"$2/failure.txt"
fi
exit "$1"
