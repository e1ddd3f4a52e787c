# $1 is how many versions are installed, this one included.
units="metadata-proxy-attach.service metadata-proxy.service"
command -v systemctl > /dev/null || exit 0
if [ "$1" -eq 1 ]; then
	systemctl --quiet enable $units || :
	echo "metadata-proxy is enabled, but not started before the next start of Docker or boot; to start it now: systemctl start metadata-proxy"
elif [ -d /run/systemd/system ]; then
	# The daemon's handover: containers' connections are held meanwhile.
	systemctl --quiet daemon-reload || :
	systemctl --quiet try-restart $units || :
fi
