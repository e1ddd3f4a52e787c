// Package client is what the Go programs have in common: when to ask, and what to print.
package client

import (
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

// Load gives the access key of the credentials that the provider has found.
type Load func() (string, error)

// Identify asks the service whose they are.
type Identify func() (string, error)

// Endpoint is that of the STS and S3 to ask.
func Endpoint() string { return os.Getenv("STS_ENDPOINT") }

// HTTP is for clients that want one.
func HTTP() *http.Client { return &http.Client{Timeout: 10 * time.Second} }

// Run does what the command line says, see ../../README.md.
func Run(version string, provider func() (Load, Identify)) {
	fmt.Println("version", version)
	loads, err := strconv.Atoi(os.Args[1])
	watch := err != nil
	load, identify := provider()
	last := ""
	for watch || loads > 0 {
		begin := time.Now()
		key, err := load()
		took := time.Since(begin)
		switch {
		case err != nil:
			fmt.Println("error", strings.Join(strings.Fields(err.Error()), " "))
		case !watch || key != last:
			last = key
			fmt.Printf("key %s %.1f\n", key, float64(took.Microseconds())/1000)
			if Endpoint() != "" {
				if arn, err := identify(); err != nil {
					fmt.Println("identity-error", strings.Join(strings.Fields(err.Error()), " "))
				} else {
					fmt.Println("identity", arn)
				}
			}
		}
		if watch {
			time.Sleep(300 * time.Millisecond)
		} else {
			loads--
			load, identify = provider()
		}
	}
}
