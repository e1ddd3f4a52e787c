# $1 is how many versions will be left; with one, this is an upgrade, and the other's scripts hand over.
[ "$1" -eq 0 ] || exit 0
units="metadata-proxy.service metadata-proxy-attach.service"
if [ -d /run/systemd/system ]; then
	systemctl --quiet disable --now $units || :
elif command -v systemctl > /dev/null; then
	systemctl --quiet disable $units || :
fi
# Its programs stay attached when it has stopped, and without the binary nothing could remove them.
METADATA_PROXY_CONFIG=/etc/metadata-proxy/config.toml metadata-proxy detach ||
	echo "metadata-proxy: its programs may still be attached, and containers without the metadata service until the next boot" >&2
